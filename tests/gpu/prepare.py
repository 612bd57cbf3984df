"""``python -m tests.gpu.prepare [--python 3.12] [--folder FOLDER]``: download the wheels that a bare GPU machine lacks.

Run it on a machine with network and ``make setup``; then bring the working tree with the folder (``build/gpu-wheels``) to
the GPU machine and type ``make gpu`` there.

Always true: the versions are those that this project is tested with; the folder holds one wheel of each package, their
hashes, and at most :data:`MOST_BYTES`, which some such machines take with a working tree.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.gpu import bare_machine, carried

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
PINS = ("cpu.txt", "gpu.txt", "deepspeed.txt")
UNPINNED = {"liger-kernel": "0.8.5"}
"""What no set of this project's requirements names, since only ``make gpu`` uses it."""
FROM_SOURCE = {"deepspeed": {"DS_BUILD_OPS": "0"}}
"""What is published without wheels, with the environment that makes one of Python files alone."""
MOST_BYTES = 56 << 20
GLIBC = ("2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
"""Versions of glibc whose wheels run on Ubuntu 22.04 and later. pip wants each of them named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder anew."""
    parser = argparse.ArgumentParser(prog="tests.gpu.prepare", description="download what a bare GPU machine lacks")
    parser.add_argument(
        "--python", default=bare_machine.PYTHON, help=f"version of its Python (default: {bare_machine.PYTHON})"
    )
    parser.add_argument("--folder", type=Path, default=carried.FOLDER, help=f"default: {carried.FOLDER}")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    versions = pins()
    for name in carried.PACKAGES:
        _fetch(name, versions[name], options.python, options.folder)
    wheels = list(options.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    if len(wheels) != len(carried.PACKAGES) or size > MOST_BYTES:
        raise SystemExit(
            f"{options.folder} holds {len(wheels)} wheels of {size / 2**20:.1f} MiB, but should hold "
            f"{len(carried.PACKAGES)} of at most {MOST_BYTES >> 20} MiB: take one from PACKAGES in tests/gpu/carried.py"
        )
    carried.write_hashes(options.folder)
    print(f"{len(wheels)} wheels for Python {options.python}, {size / 2**20:.1f} MiB, in {options.folder}")
    return 0


def pins() -> dict[str, str]:
    """The version of each package that the requirements of this project pin."""
    lines = [line for name in PINS for line in (REQUIREMENTS / name).read_text().splitlines()]
    pairs = [line.split(" ")[0].split("==") for line in lines if "==" in line and not line.startswith("#")]
    return UNPINNED | {canonicalize_name(name): version for name, version in pairs}


def _fetch(name: str, version: str, python: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wanted = f"{name}=={version}"
    if name in FROM_SOURCE:
        command = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), wanted]
        subprocess.run(command, check=True, env=os.environ | FROM_SOURCE[name])
        return
    systems = [f"--platform=manylinux_{glibc}_{platform.machine()}" for glibc in GLIBC]
    systems += [f"--platform={older}_{platform.machine()}" for older in ("manylinux2014", "manylinux1")]
    command = [
        *(*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)),
        *("--implementation", "cp", "--python-version", python, *systems, wanted),
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
