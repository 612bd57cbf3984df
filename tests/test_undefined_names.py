"""Every name in the code is defined somewhere, but for the dimensions in jaxtyping's shapes.

``Float[Tensor, "N"]`` holds a string that is no annotation. So ruff's F821 and mypy's name-defined, which take it for one, are
off in ``pyproject.toml``, and without this test nothing would find a name that is defined nowhere.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]
Place = tuple[int, int]
"""Line and column, both from 1."""


def undefined(*paths: Path) -> list[str]:
    """The names that ruff finds undefined, outside shapes: file, line and message."""
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    run = subprocess.run([*ruff, *map(str, paths)], capture_output=True, text=True, timeout=60)
    assert run.returncode in (0, 1), run.stderr
    found = json.loads(run.stdout)
    shapes = {file: shape_strings(Path(file).read_text("utf-8")) for file in {one["filename"] for one in found}}
    return [
        f"{one['filename']}:{one['location']['row']}: {one['message']}"
        for one in found
        if not any(
            start <= (one["location"]["row"], one["location"]["column"]) < end for start, end in shapes[one["filename"]]
        )
    ]


def shape_strings(source: str) -> list[tuple[Place, Place]]:
    """Where the shapes of jaxtyping's types begin and end in ``source``."""
    lines = source.splitlines()

    def place(line: int, offset: int) -> Place:
        return line, len(lines[line - 1].encode()[:offset].decode()) + 1

    return [
        (place(shape.lineno, shape.col_offset), place(shape.end_lineno or 0, shape.end_col_offset or 0))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and hasattr(jaxtyping, node.value.id)
        and isinstance(node.slice, ast.Tuple)
        for shape in node.slice.elts[1:]
    ]


HEAD = "from __future__ import annotations\nfrom torch import Tensor\nfrom jaxtyping import Float\n"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("def f(x: Nowhere) -> None: ...", "Nowhere"),
        ("def f() -> 'list[Nowhere]': ...", "Nowhere"),
        ("def f(x: Float[Nowhere, 'N']) -> None: ...", "Nowhere"),
        ("def f(x: Float[Tensor, 'N'], é: N) -> None: ...", "N"),
        ("x: dict[str, 'Nowhere'] = {}", "Nowhere"),
        ("def f() -> None:\n    nowhere()", "nowhere"),
    ],
)
def test_a_name_that_is_defined_nowhere_is_found(line: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"{HEAD}{line}\n", "utf-8")
    (found,) = undefined(tmp_path)
    assert found.endswith(f"Undefined name `{name}`")


def test_a_dimension_in_a_shape_is_none(tmp_path: Path) -> None:
    shapes = "def f(é: Float[Tensor, 'N'], b: Float[Tensor, 'B T'], c: Float[Tensor, ' tokens']) -> None: ...\n"
    (tmp_path / "module.py").write_text(HEAD + shapes, "utf-8")
    assert undefined(tmp_path) == []


def test_no_name_of_the_project_is_undefined() -> None:
    found = undefined(*(ROOT / room for room in ("rlhf_ray", "tests", "benchmarks", "examples")))
    assert not found, "\n".join(found)
