"""A crash at any line of the storage code leaves the old content or the new one, whole: a child is killed at each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray import storage
from rlhf_ray.storage import atomic, manifest

STORAGE = (atomic, manifest)
OLD = {"weights.bin": b"old" * 50}
NEW = {"weights.bin": b"new" * 70, "rank-0/state.json": b'{"step": 2}'}

CrashEverywhere = Callable[[Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]


def write_tree(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def commit_tree(target: Path, files: dict[str, bytes], replace: bool = True) -> None:
    pending = storage.begin_directory(target, replace=replace)
    write_tree(pending.path, files)
    storage.commit(pending)


def content(target: Path) -> dict[str, bytes] | None:
    """The verified files of a directory, or none where there is none."""
    if not target.exists():
        return None
    return {name: (target / name).read_bytes() for name in storage.verify(target).files}


def assert_turns_once(seen: list[Any], before: Any, after: Any) -> None:
    """First always ``before``, then always ``after``, and both were seen: the test has crossed the commit."""
    turn = seen.index(after)
    assert seen[:turn] == [before] * turn and turn > 0
    assert seen[turn:] == [after] * (len(seen) - turn)


def test_a_crash_while_a_directory_is_replaced_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, crash_everywhere: CrashEverywhere
) -> None:
    target = tmp_path / "final"
    commit_tree(target, OLD)

    def observe() -> Any:
        at_once = content(target)
        storage.sweep(tmp_path)
        assert content(target) == at_once
        assert os.listdir(tmp_path) == ["final"]
        commit_tree(target, OLD)
        return at_once

    seen = crash_everywhere(lambda: commit_tree(target, NEW), observe, STORAGE)
    assert len(seen) > 60
    assert_turns_once(seen, OLD, NEW)


def test_a_crash_while_a_new_directory_is_made_leaves_nothing_or_all_of_it(
    tmp_path: Path, crash_everywhere: CrashEverywhere
) -> None:
    target = tmp_path / "step-000002"

    def observe() -> Any:
        at_once = content(target)
        storage.sweep(tmp_path)
        assert content(target) == at_once
        shutil.rmtree(target, ignore_errors=True)
        assert os.listdir(tmp_path) == []
        return at_once

    assert_turns_once(crash_everywhere(lambda: commit_tree(target, NEW, replace=False), observe, [atomic]), None, NEW)


def test_where_names_cannot_be_swapped_a_sweep_settles_the_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_everywhere: CrashEverywhere
) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    target = tmp_path / "final"
    commit_tree(target, OLD)
    gaps = 0

    def observe() -> Any:
        nonlocal gaps
        gaps += not target.exists()
        storage.sweep(tmp_path)
        settled = content(target)
        assert os.listdir(tmp_path) == ["final"]
        commit_tree(target, OLD)
        return settled

    assert_turns_once(crash_everywhere(lambda: commit_tree(target, NEW), observe, [atomic]), OLD, NEW)
    assert gaps > 0, "the crash between the two renames was never met"


def test_a_crash_while_a_sweep_settles_loses_nothing(tmp_path: Path, crash_everywhere: CrashEverywhere) -> None:
    target = tmp_path / "final"

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        commit_tree(tmp_path / ".replaced-final-0123456789ab", OLD)
        write_tree(tmp_path / ".pending-final-0123456789ac", NEW)

    prepare()

    def observe() -> Any:
        storage.sweep(tmp_path)
        settled = content(target)
        assert os.listdir(tmp_path) == ["final"]
        prepare()
        return settled

    seen = crash_everywhere(lambda: storage.sweep(tmp_path), observe, STORAGE)
    assert seen == [OLD] * len(seen)


def test_a_crash_while_a_directory_is_removed_never_shows_half_of_it(
    tmp_path: Path, crash_everywhere: CrashEverywhere
) -> None:
    target = tmp_path / "step-000001"
    commit_tree(target, OLD)

    def observe() -> Any:
        at_once = content(target)
        storage.sweep(tmp_path)
        commit_tree(target, OLD)
        return at_once

    modules = (*STORAGE, shutil)  # the removal itself too, file by file
    assert_turns_once(crash_everywhere(lambda: storage.remove_directory(target), observe, modules), OLD, None)


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_crash_while_a_file_is_written_leaves_the_old_content_or_the_new(
    tmp_path: Path, old: bytes | None, crash_everywhere: CrashEverywhere
) -> None:
    path = tmp_path / "config.yaml"

    def prepare() -> None:
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)

    prepare()

    def observe() -> Any:
        at_once = path.read_bytes() if path.exists() else None
        storage.sweep(tmp_path)
        assert os.listdir(tmp_path) == ([] if at_once is None else ["config.yaml"])
        prepare()
        return at_once

    assert_turns_once(crash_everywhere(lambda: storage.write_file(path, b"new"), observe, STORAGE), old, b"new")


def test_all_bytes_are_on_disk_before_the_name_and_the_name_before_the_commit_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut keeps is what was synced, so the order of the calls is the promise."""
    synced: set[int] = set()
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        synced.add(inode)
        if inode == tmp_path.stat().st_ino:
            events.append("parent synced")

    def rename(source: Path, target: Path) -> None:
        inside = {Path(source).stat().st_ino, *(path.stat().st_ino for path in Path(source).rglob("*"))}
        assert len(inside) == 1 + len(NEW) + 1 + 1, "the files, the rank's directory, the manifest and the root"
        assert inside <= synced
        real_rename(source, target)
        events.append("renamed")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    commit_tree(tmp_path / "step-000002", NEW, replace=False)
    assert events == ["renamed", "parent synced"]
