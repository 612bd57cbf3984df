"""Run statements of a method that cannot be called on its own: code written inline in a training loop of hundreds of lines.

For the oracles, which run in the environment of the independent implementations. The statements run as they stand in the
installed file; only the names that they read are given.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any


def run(method: Callable[..., Any], first: str, last: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """The names after running the statements from the one that begins with ``first`` to the one that begins with ``last``.

    Both stand in the same block, and each beginning is that of one statement of the method only.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    found = [
        block[start : stop + 1]
        for block in blocks(tree)
        for start in begins(block, first)
        for stop in begins(block, last)
        if start <= stop
    ]
    if len(found) != 1:
        raise SystemExit(
            f"{method.__qualname__}: {len(found)} blocks run from {first!r} to {last!r}, but one is wanted"
        )
    space = {**method.__globals__, **names}  # type: ignore[attr-defined]
    exec(compile(ast.Module(found[0], []), inspect.getsourcefile(method) or "excerpt", "exec"), space)
    return space


def blocks(tree: ast.AST) -> list[list[ast.stmt]]:
    """Every list of statements in a tree."""
    fields = [getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse", "finalbody")]
    return [field for field in fields if isinstance(field, list)]


def begins(block: list[ast.stmt], text: str) -> list[int]:
    return [at for at, statement in enumerate(block) if ast.unparse(statement).startswith(text)]
