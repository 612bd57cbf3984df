"""Finding and loading Python that a config names: nothing is executed by looking, and every failure names the key."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray import user_code
from rlhf_ray.errors import RequestError
from rlhf_ray.user_code import (
    OBJECTIVES,
    accepts,
    check_parameters,
    construct,
    existence_problems,
    load_object,
    spelling_problem,
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``mine_for_tests`` whose modules must not be executed by looking at them."""
    root = tmp_path / "mine_for_tests"
    root.mkdir()
    (root / "__init__.py").write_text("raise RuntimeError('executed')\n")
    (root / "parts.py").write_text("import os\n\nif os.name:\n    A: int = 1\nB, C = 1, 2\n\nclass D: ...\n")
    (root / "lazy.py").write_text("def __getattr__(name): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package has the entry point ``plain`` in the group of objectives."""
    points = EntryPoints([EntryPoint("plain", "rlhf_ray.algorithms.policy_loss:Clipped", OBJECTIVES)])
    monkeypatch.setattr(user_code, "entry_points", points.select)


@pytest.mark.parametrize("name", ["A", "B", "C", "D", "os"])
def test_a_name_in_a_module_is_found_without_executing_its_package(package: Path, name: str) -> None:
    assert list(existence_problems(f"mine_for_tests.parts:{name}")) == []
    assert "mine_for_tests" not in sys.modules


def test_a_module_or_name_that_is_not_there_is_a_problem(package: Path) -> None:
    assert list(existence_problems("mine_for_tests.parts:E")) == [
        f"{package}/parts.py defines no 'E'; it defines A, B, C, D"
    ]
    for module in ("mine_for_tests.other", "mine_for_tests.parts.deeper", "no_such_package.at_all"):
        (problem,) = existence_problems(f"{module}:x")
        assert problem == f"there is no module {module}: install its package, or name a Python file, as path.py:name"


def test_a_module_that_makes_its_names_when_asked_is_not_judged(package: Path) -> None:
    assert list(existence_problems("mine_for_tests.lazy:anything")) == []
    assert list(existence_problems("rlhf_ray.algorithms:Clipped")) == []


def test_names_that_are_no_names_are_refused_with_all_spellings(entry_point: None) -> None:
    assert spelling_problem("clip", ("clip",), OBJECTIVES) is None
    assert spelling_problem("a.py:b", (), OBJECTIVES) is None
    assert spelling_problem("plain", (), OBJECTIVES) is None
    assert spelling_problem("plan", ("clip", "cispo"), OBJECTIVES) == (
        "'plan' is not one of package.module:name, path.py:name, clip, cispo, nor an installed entry point of the group "
        "rlhf_ray.objectives (installed: plain)"
    )


def test_an_entry_point_is_loaded(entry_point: None) -> None:
    from rlhf_ray.algorithms.policy_loss import Clipped

    assert load_object("key", "plain", group=OBJECTIVES) is Clipped
    with pytest.raises(RequestError, match=r"key 'plan': write it as package.module:class or path.py:class"):
        load_object("key", "plan", group=OBJECTIVES, kind="class")


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.py").write_text(f"class Own:\n    where = {folder!r}\n")
    one, two = (load_object("key", f"{tmp_path / folder}/part.py:Own") for folder in ("one", "two"))
    assert (one.where, two.where) == ("one", "two") and one.__module__ != two.__module__
    assert sys.modules[one.__module__].Own is one


def takes(first: int, /, second: int = 0) -> None: ...


def any_keywords(**anything: Any) -> dict[str, Any]:
    return anything


def two(run: Any, size: int = 1) -> tuple[Any, int]:
    return run, size


def test_a_factory_gets_what_it_asks_for_and_nothing_else() -> None:
    assert construct("key", "name", two, {"size": 3}, run="run", unasked="x") == ("run", 3)
    assert construct("key", "name", any_keywords, {"size": 3}, run="run") == {"size": 3, "run": "run"}
    assert check_parameters("key", "name", two, {}, ("run",)) == ("run", "size")
    for parameters, refusal in (
        ({"sise": 1}, "takes no parameter sise; it takes size"),
        ({"run": 1}, "no parameter run"),
    ):
        with pytest.raises(RequestError, match=rf"key 'name': it {refusal}|{refusal}"):
            construct("key", "name", two, parameters, run="run")
    with pytest.raises(RequestError, match="its parameter first cannot be given by name: remove the '/'"):
        construct("key", "name", takes, {})
    with pytest.raises(RequestError, match="it needs the parameter run: add it to the parameters in the config"):
        construct("key", "name", two, {})


def test_what_a_call_accepts_is_read_off_its_signature() -> None:
    assert accepts(two, "run", "size") and accepts(two, "run") and not accepts(two, "a", "b", "c")
    assert not accepts(None, "a")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"# -*- coding: latin-1 -*-\nname = '\xe9'\n", None),
        (b"\xef\xbb\xbfname = 1\n", None),
        (b"name = '\xe9'\n", "not Python"),
        (b"name = 1\x00\n", "not Python: source code string cannot contain null bytes"),
    ],
)
def test_a_file_is_read_in_the_encoding_it_names_and_otherwise_a_problem(
    tmp_path: Path, content: bytes, problem: str | None
) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes(content)
    problems = list(existence_problems(f"{file}:name"))
    if problem is None:
        assert problems == []
    else:
        assert len(problems) == 1 and problem in problems[0] and "None" not in problems[0]


@pytest.mark.parametrize("name", [":name", "path.py:", ":"])
def test_a_name_with_an_empty_half_is_badly_spelt(name: str) -> None:
    assert spelling_problem(name, ("clip",)) == f"{name!r} is not one of package.module:name, path.py:name, clip"
    assert list(existence_problems(name)) == []


def test_a_module_that_ends_the_process_when_it_is_imported_is_an_error_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(RequestError, match=r"algorithm\.objective .* cannot be imported \(SystemExit\(3\)\)"):
        load_object("algorithm.objective", f"{tmp_path}/script.py:name")
