"""A crash at any line of the storage code leaves the old content or the new one, whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from rlhf_ray import storage
from rlhf_ray.storage import atomic, made, manifest
from rlhf_ray.storage.atomic import PENDING, REPLACED
from rlhf_ray.storage.made import temporary_name

pytestmark = pytest.mark.early

STORAGE = (atomic, made, manifest, shutil)
OLD = {"weights.bin": b"old" * 50}
NEW = {"weights.bin": b"new" * 70, "rank-0/state.json": b'{"step": 2}'}
KILLED = 77

CrashEverywhere = Callable[[Path, Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]


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


def content_now_and_after_a_sweep(target: Path) -> tuple[Any, Any]:
    """The sweep must leave nothing but the target, whole."""
    now = content(target)
    storage.sweep(target.parent)
    after = content(target)
    assert os.listdir(target.parent) == ([] if after is None else [target.name])
    return now, after


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
    seen = crash_everywhere(
        tmp_path, lambda: commit_tree(target, NEW), lambda: content_now_and_after_a_sweep(target), STORAGE
    )
    assert len(seen) >= 6
    assert_turns_once(seen, (OLD, OLD), (NEW, NEW))


def test_a_crash_while_a_new_directory_is_made_leaves_nothing_or_all_of_it(
    tmp_path: Path, crash_everywhere: CrashEverywhere
) -> None:
    target = tmp_path / "step-000002"
    seen = crash_everywhere(
        tmp_path,
        lambda: commit_tree(target, NEW, replace=False),
        lambda: content_now_and_after_a_sweep(target),
        STORAGE,
    )
    assert len(seen) >= 4
    assert_turns_once(seen, (None, None), (NEW, NEW))


def test_where_names_cannot_be_swapped_a_sweep_settles_the_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_everywhere: CrashEverywhere
) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    target = tmp_path / "final"
    commit_tree(target, OLD)
    seen = crash_everywhere(
        tmp_path, lambda: commit_tree(target, NEW), lambda: content_now_and_after_a_sweep(target), STORAGE
    )
    assert_turns_once([after for _, after in seen], OLD, NEW)
    assert [now for now, _ in seen].count(None) == 1, "the crash between the two renames was not met"


def test_a_crash_while_a_sweep_settles_loses_nothing(tmp_path: Path, crash_everywhere: CrashEverywhere) -> None:
    target = tmp_path / "final"
    commit_tree(tmp_path / temporary_name("final", REPLACED), OLD)
    write_tree(tmp_path / temporary_name("final", PENDING), NEW)
    seen = crash_everywhere(
        tmp_path, lambda: storage.sweep(tmp_path), lambda: content_now_and_after_a_sweep(target), STORAGE
    )
    assert_turns_once(seen, (None, OLD), (OLD, OLD))


def test_a_crash_while_a_directory_is_removed_never_shows_half_of_it(
    tmp_path: Path, crash_everywhere: CrashEverywhere
) -> None:
    target = tmp_path / "step-000001"
    commit_tree(target, NEW)
    seen = crash_everywhere(
        tmp_path, lambda: storage.remove_directory(target), lambda: content_now_and_after_a_sweep(target), STORAGE
    )
    assert len(seen) >= 5, "the directory was not seen half removed"
    assert_turns_once(seen, (NEW, NEW), (None, None))


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_crash_while_a_file_is_written_leaves_the_old_content_or_the_new(
    tmp_path: Path, old: bytes | None, crash_everywhere: CrashEverywhere
) -> None:
    path = tmp_path / "config.yaml"
    if old is not None:
        path.write_bytes(old)

    def observe() -> bytes | None:
        now = path.read_bytes() if path.exists() else None
        storage.sweep(tmp_path)
        assert os.listdir(tmp_path) == ([] if now is None else ["config.yaml"])
        return now

    seen = crash_everywhere(tmp_path, lambda: storage.write_file(path, b"new"), observe, STORAGE)
    assert len(seen) >= 3
    assert_turns_once(seen, old, b"new")


def test_a_process_that_dies_at_any_line_leaves_the_old_directory_or_the_new_one(tmp_path: Path) -> None:
    """The same with real processes: a child ends without a word before each line in turn."""
    target = tmp_path / "final"
    commit_tree(target, OLD)
    seen = []
    for line in range(1, 1000):
        died = run_until_line(line, lambda: commit_tree(target, NEW))
        seen.append(content_now_and_after_a_sweep(target))
        if not died:
            break
    assert len(seen) > 40
    assert_turns_once(seen, (OLD, OLD), (NEW, NEW))


def run_until_line(count: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a child that dies before its ``count``-th line of ``atomic``; whether it died."""
    pid = os.fork()
    if pid == 0:
        left = count

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != atomic.__file__:
                return None
            left -= event == "line"
            if left == 0:
                os._exit(KILLED)
            return trace

        sys.settrace(trace)
        try:
            action()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"the action failed at line {count} with exit code {code}"
    return code == KILLED


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
