"""Whether the Python functions that a config names stand in their files.

Invariant: no user's code is run: a file is parsed, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def function_problems(name: str) -> Iterator[str]:
    """What is wrong with ``path.py:name``; a function in a package is looked for where it is imported."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        return
    path = Path(file)
    if not path.is_file():
        yield f"{path} does not exist: name a Python file, as path.py:name"
        return
    try:
        names = list(_names(ast.parse(path.read_text())))
    except SyntaxError as error:
        yield f"{path}:{error.lineno}: not Python: {error.msg}"
        return
    if function not in names:
        yield f"{path} defines no {function!r}; it defines {', '.join(names) or 'nothing'}"


def _names(module: ast.Module) -> Iterator[str]:
    """What importing ``module`` would define, as far as its text says."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
