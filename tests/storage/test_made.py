"""What was not made here is never removed: neither by its name, nor because it lies in a directory that goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray import storage
from rlhf_ray.errors import StorageError
from rlhf_ray.storage import atomic, made
from rlhf_ray.storage.atomic import PENDING
from rlhf_ray.storage.made import make_directories, remove_empty, target_of, temporary_name

CrashEverywhere = Callable[[Path, Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]


def commit(target: Path, content: bytes) -> None:
    pending = storage.begin_directory(target, replace=True)
    (pending.path / "deep").mkdir()
    (pending.path / "deep/weights").write_bytes(content)
    storage.commit(pending)


def notes(parent: Path) -> list[bytes]:
    """What lies anywhere under the names of files that a user added."""
    return sorted(path.read_bytes() for path in parent.rglob("notes*") if path.is_file())


@pytest.mark.parametrize("name", ["final", "a-b", "x" * 200, "ü" * 110, "with space", "-", ".pending-a"])
def test_a_temporary_name_is_known_again_and_no_other(name: str) -> None:
    given = temporary_name(name, PENDING)
    assert len(os.fsencode(given)) <= 255
    target = target_of(given, PENDING)
    assert target is not None and name.startswith(target.rstrip("\udcc3"))
    assert target_of(given[:-1] + ("0" if given[-1] != "0" else "1"), PENDING) is None
    assert target_of(given.replace(PENDING, ""), PENDING) is None


@pytest.mark.parametrize("act", ["replace", "remove"])
def test_files_that_were_added_to_a_committed_directory_outlive_it(tmp_path: Path, act: str, project_log: Any) -> None:
    target = tmp_path / "final"
    for number in (1, 2):
        commit(target, b"old")
        (target / "notes.txt").write_bytes(b"%d" % number)
        (target / "deep/notes").write_bytes(b"%d deep" % number)
        (target / "link").symlink_to(tmp_path)
        if act == "replace":
            commit(target, b"new")
            storage.verify(target)
            assert (target / "deep/weights").read_bytes() == b"new"
        else:
            storage.remove_directory(target)
            assert not target.exists()
    assert notes(tmp_path) == [b"1", b"1 deep", b"2", b"2 deep"]
    kept = sorted(path.name for path in tmp_path.iterdir() if path != target)
    assert kept == ["final.kept", "final.kept-2"]
    assert sorted(os.listdir(tmp_path / "final.kept")) == ["deep", "link", "notes.txt"], "only what was added is kept"
    assert "final.kept holds 3 files that were not written" in project_log.getvalue()


def test_a_directory_that_was_never_committed_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final/notes").write_bytes(b"mine")
    commit(tmp_path / "final", b"new")
    assert (tmp_path / "final.kept/notes").read_bytes() == b"mine"


@pytest.mark.parametrize("act", ["replace", "remove"])
def test_a_crash_at_any_line_loses_no_file_that_was_added(
    tmp_path: Path, crash_everywhere: CrashEverywhere, act: str
) -> None:
    target = tmp_path / "below" / "final"
    target.parent.mkdir()
    commit(target, b"old")
    (target / "deep/notes").write_bytes(b"mine")

    def action() -> None:
        commit(target, b"new") if act == "replace" else storage.remove_directory(target)

    def observe() -> list[bytes]:
        storage.sweep(target.parent)
        return notes(target.parent)

    seen = crash_everywhere(target.parent, action, observe, [atomic, made, shutil])
    assert len(seen) > 4
    assert set(map(tuple, seen)) == {(b"mine",)}


@pytest.mark.parametrize("occupied", ["a link", "a broken link", "a file", "a pipe"])
@pytest.mark.parametrize("replace", [True, False])
def test_a_directory_takes_the_place_of_a_directory_only(tmp_path: Path, occupied: str, replace: bool) -> None:
    target, elsewhere = tmp_path / "final", tmp_path / "elsewhere"
    elsewhere.mkdir()
    makers: dict[str, Callable[[], object]] = {
        "a link": lambda: target.symlink_to(elsewhere),
        "a broken link": lambda: target.symlink_to("nowhere"),
        "a file": lambda: target.write_text("mine"),
        "a pipe": lambda: os.mkfifo(target),
    }
    makers[occupied]()
    before = target.lstat().st_ino
    with pytest.raises(StorageError, match=str(target)):
        storage.begin_directory(target, replace=replace)
    assert target.lstat().st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "final"]


def test_directories_that_were_made_go_while_they_are_empty(tmp_path: Path) -> None:
    made_here = make_directories(tmp_path / "a/b/c", 0o750)
    assert made_here == [tmp_path / "a/b/c", tmp_path / "a/b", tmp_path / "a"]
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o750
    (tmp_path / "a/theirs").write_text("")
    remove_empty(made_here)
    assert os.listdir(tmp_path / "a") == ["theirs"]
    assert make_directories(tmp_path / "a") == []
    with pytest.raises(FileExistsError):
        make_directories(tmp_path / "a/theirs")
    with pytest.raises(NotADirectoryError):
        make_directories(tmp_path / "a/theirs/b/c")
    assert os.listdir(tmp_path / "a") == ["theirs"]
