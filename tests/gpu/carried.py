"""The packages that a bare GPU machine lacks, as wheels in a folder that travels with the working tree.

Always true: only files that lie there as ``python -m tests.gpu.prepare`` left them are installed, and into a folder of
their own: nothing is installed into the machine's Python.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "gpu-wheels"
HASHES = "SHA256SUMS"
PACKAGES = (
    "annotated-types", "bitsandbytes", "deepspeed", "einops", "hjson", "liger-kernel", "msgpack", "ninja", "psutil",
    "py-cpuinfo", "pydantic", "pydantic-core", "typing-extensions", "typing-inspection",
)  # fmt: skip
"""What the checks import beyond torch, transformers, peft, jaxtyping and rich, with all that this needs in turn."""


def prepared(folder: Path) -> bool:
    """Whether there is something to install."""
    return (folder / HASHES).exists()


def write_hashes(folder: Path) -> None:
    """Keep the hashes of the wheels, in the form of ``sha256sum``."""
    lines = [f"{_sha256(wheel)}  {wheel.name}\n" for wheel in sorted(folder.glob("*.whl"))]
    (folder / HASHES).write_text("".join(lines))


def install(folder: Path, target: Path) -> str:
    """Install the wheels of ``folder`` into ``target``, and let this process and its children import from there first.

    Says what it installed. Raises ``SystemExit`` with the way out if a wheel is missing or changed, or is for another
    Python.
    """
    names = []
    for line in (folder / HASHES).read_text().splitlines():
        expected, name = line.split()
        wheel = folder / name
        if not wheel.exists() or _sha256(wheel) != expected:
            state = "is not as it was prepared" if wheel.exists() else "is missing"
            raise SystemExit(f"{wheel} {state}: make the folder again with python -m tests.gpu.prepare")
        names.append(name)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"),
            *("--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)),
            *(str(folder / name) for name in names),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SystemExit(
            f"the wheels of {folder} cannot be installed: {done.stderr.strip()[-500:]}\n"
            f"prepare them for this Python with python -m tests.gpu.prepare --python {python}"
        )
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    return ", ".join(name.split("-py")[0].split("-cp")[0] for name in names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
