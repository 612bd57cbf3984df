"""The environment in which the independent implementations run.

Always true: it holds nothing of this project, only pinned packages; it is made once, and again when a pin changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_ray.environment import for_process

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".venv-parity"
PINS = (
    Path(__file__).parent / "requirements.txt",
    ROOT / "requirements/torch-cpu.txt",
    ROOT / "requirements/cpu.txt",
    Path(__file__),
)
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""Of this process's variables; others could tell a trainer that it is one rank of a group."""
BESIDE = {"openrlhf": "openrlhf==0.11.2", "trl-1.12": "trl==1.12.0", "torchtune": "torchtune==0.6.1",
          "verl": "verl==0.9.1"}  # fmt: skip
"""Pure Python that cannot be installed there: OpenRLHF brings a package called tests, TRL 1.12 is TRL too, and torchtune
and verl want what the others cannot have. Each is read as files, from a folder of its own beside site-packages."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def python() -> Path:
    """Its interpreter, after making the environment where it is missing or holds other pins."""
    interpreter = DIRECTORY / "bin/python"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in PINS)).hexdigest()[:16]
    stamp = DIRECTORY / f".pins-{digest}"
    if not stamp.exists():
        print(f"setting up {DIRECTORY.name} (once; a few minutes)", flush=True)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", DIRECTORY], check=True)
        _install(interpreter)
        stamp.touch()
    return interpreter


def run(script: Path, *arguments: str | Path, timeout_s: float = 600.0) -> None:
    """Run a script there, on one thread and without a network; its output is shown only when it fails."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    ended = subprocess.run(
        [python(), script, *arguments],
        env=kept | for_process(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    if ended.returncode != 0:
        raise SystemExit(f"{ended.stdout}\n{script.name} failed in {DIRECTORY.name} (exit code {ended.returncode})")


def _install(interpreter: Path) -> None:
    """torch from the index that pip is configured with, else from PyTorch's own; the rest at this project's versions."""
    requirements, torch, versions, _ = PINS
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
    only_torch = ["--no-deps", "-r", torch]
    if subprocess.run([*pip, *only_torch]).returncode != 0:
        elsewhere = ["--timeout", "15", "--retries", "2", "--index-url", TORCH_INDEX]
        _must([*pip, *elsewhere, *only_torch])
    _must([*pip, "-r", requirements, "-c", versions])
    for folder, pin in BESIDE.items():
        beside = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "--target", DIRECTORY / folder]
        _must([*pip, *beside, pin])


def _must(command: list[str | Path]) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"cannot install the pinned packages of {DIRECTORY.name}: see pip's message above. Comparing with independent "
            "implementations needs a package index; make test compares with their committed values without one"
        )
