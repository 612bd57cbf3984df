"""Writers of one directory, refusals, and what the operating system's errors become."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray import storage
from rlhf_ray.errors import EXIT_FAILED, StorageError
from rlhf_ray.storage.atomic import PENDING
from rlhf_ray.storage.made import temporary_name


def test_several_processes_write_into_one_pending_directory(tmp_path: Path) -> None:
    pending = storage.begin_directory(tmp_path / "step")
    script = (
        "import pathlib, sys; d = pathlib.Path(sys.argv[1]) / sys.argv[2]; d.mkdir(); (d / 'x').write_text(sys.argv[2])"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(pending.path), f"rank-{rank}"]) for rank in range(3)]
    assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    assert not (tmp_path / "step").exists()
    written = storage.commit(pending, expected=["rank-0/x", "rank-1/x", "rank-2/x"])
    assert sorted(written.files) == ["rank-0/x", "rank-1/x", "rank-2/x"]
    assert storage.verify(tmp_path / "step") == written


def test_a_file_that_another_process_says_it_wrote_must_be_there(tmp_path: Path) -> None:
    pending = storage.begin_directory(tmp_path / "step")
    (pending.path / "rank-0").write_bytes(b"here")
    with pytest.raises(StorageError, match=r"1 of 2 files .* such as rank-1: .*shared file system"):
        storage.commit(pending, expected=["rank-0", "rank-1"])
    assert os.listdir(tmp_path) == []


def test_an_existing_target_is_refused_at_the_start_and_at_the_commit(tmp_path: Path) -> None:
    target = tmp_path / "out"
    late = storage.begin_directory(target)
    (late.path / "mine").write_text("late")
    target.mkdir()
    (target / "theirs").write_text("first")
    with pytest.raises(StorageError, match="out exists already"):
        storage.begin_directory(target)
    with pytest.raises(
        StorageError, match="out exists already, made by another process meanwhile: it was not overwritten"
    ):
        storage.commit(late)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["theirs"]


def test_a_replaced_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        pending = storage.begin_directory(tmp_path / "final", replace=True)
        (pending.path / "weights").write_bytes(content)
        storage.commit(pending)
    assert (tmp_path / "final" / "weights").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["final"]


def test_whoever_reads_a_file_while_it_is_replaced_reads_the_old_one_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    storage.write_file(path, "old content")
    with open(path) as reader:
        assert reader.read(3) == "old"
        storage.write_file(path, "new")
        reader.seek(0)
        assert reader.read() == "old content"
    assert path.read_text() == "new"


def test_a_sweep_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    others = (
        ".hidden", ".pending-thesis", ".pending-metrics.jsonl-abc", ".pending-final-0123456789ab", ".replaced-a-0123456789ab",
        ".pending-final-0123456789abcdef", ".pending-", ".replaced--",
    )  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / temporary_name("link", PENDING)).symlink_to(tmp_path / "step-000001")
    kept = sorted(os.listdir(tmp_path))
    storage.begin_directory(tmp_path / "step-000002")
    (tmp_path / temporary_name("metrics.jsonl", PENDING)).write_text("half a file")
    removed = storage.sweep(tmp_path)
    assert len(removed) == 2
    assert sorted(os.listdir(tmp_path)) == kept


@pytest.fixture(params=[errno.ENOSPC, errno.EDQUOT])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to fill the disk: from then on it refuses to keep what is written."""

    def fsync(descriptor: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    return lambda: monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_a_clear_message_and_leaves_the_old_directory(
    tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    target = tmp_path / "final"
    first = storage.begin_directory(target)
    (first.path / "weights").write_bytes(b"old")
    storage.commit(first)

    second = storage.begin_directory(target, replace=True)
    (second.path / "weights").write_bytes(b"new")
    full_disk()
    with pytest.raises(
        StorageError, match=r"disk full: cannot write .*/final: .* are free at .*Free some space"
    ) as caught:
        storage.commit(second)
    assert caught.value.exit_code == EXIT_FAILED, "the request is right, and may be made again"
    assert storage.verify(target).files.keys() == {"weights"}
    assert (target / "weights").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["final"]


def test_a_file_is_never_half_written_on_a_full_disk(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    (tmp_path / "config.yaml").write_text("old")
    full_disk()
    with pytest.raises(StorageError, match=r"disk full: cannot write .*config\.yaml"):
        storage.write_file(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_place_that_cannot_be_written_is_a_clear_message() -> None:
    with pytest.raises(StorageError, match=r"cannot write /sys/rlhf.*choose a directory that is"):
        storage.begin_directory("/sys/rlhf-ray-run/final")  # refused to everyone, root included


def test_a_file_in_the_place_of_a_directory_is_a_clear_message(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot use .*run"):
        storage.write_file(tmp_path / "run" / "config.yaml", "x")


def test_an_error_inside_the_replacement_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "final"
    first = storage.begin_directory(target)
    (first.path / "weights").write_bytes(b"old")
    storage.commit(first)
    real_rename, calls = os.rename, []

    def rename(source: Path, destination: Path) -> None:
        calls.append(Path(destination))
        if calls.count(target) == 2:  # the first attempt finds the target in the way, the second puts the new one there
            raise OSError(errno.ENOSPC, "No space left on device")
        real_rename(source, destination)

    monkeypatch.setattr("rlhf_ray.storage.atomic.exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", rename)
    second = storage.begin_directory(target, replace=True)
    (second.path / "weights").write_bytes(b"new")
    with pytest.raises(StorageError, match="disk full"):
        storage.commit(second)
    assert (target / "weights").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["final"]
