"""What a docstring refers to is there: modules, and names in modules, of this package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r":(?:mod|func|class|meth|data|attr|exc):`~?(rlhf_ray\.[\w.]+)`")
FILE = re.compile(r"``([\w/]+\.py)``")


@cache
def names_in(module: Path) -> dict[str, set[str]]:
    """The names that a module binds, with what each class among them binds itself."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(module.read_text()).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for name in bound(node):
            found[name] = {name for inner in inside for name in bound(inner)}
    return found


def bound(node: ast.AST) -> Iterator[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "lazy_exports":
            yield from ast.literal_eval(node.value.args[1])


def is_there(reference: str) -> bool:
    """Whether ``reference``, a dotted path, is a module, a name in one, or a name in a class in one."""
    path, parts = ROOT, reference.split(".")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    module = path / "__init__.py"
    if parts and (path / f"{parts[0]}.py").is_file():
        module = path / f"{parts.pop(0)}.py"
    if not parts:
        return module.is_file()
    names = names_in(module)
    return parts[0] in names and (len(parts) == 1 or (len(parts) == 2 and parts[1] in names[parts[0]]))


def sources() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "rlhf_ray").rglob("*.py")):
        yield path, path.read_text()


def test_every_name_that_a_docstring_refers_to_is_there() -> None:
    found = [(path.relative_to(ROOT), name) for path, text in sources() for name in REFERENCE.findall(text)]
    assert len(found) > 30
    assert [f"{path}: {name}" for path, name in found if not is_there(name)] == []


def test_every_file_that_a_docstring_names_is_there() -> None:
    found = [(path, name) for path, text in sources() for name in FILE.findall(text)]
    assert len(found) > 30
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in found
        if not any((place / name).is_file() for place in path.parents)
    ]
    assert missing == []
