"""Checkpoints: whole or absent, verified before use, never fewer valid ones than promised."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.runs import CheckpointStore, checkpoints
from rlhf_ray.runs.checkpoints import SKIPPED_SINCE
from rlhf_ray.storage import atomic
from rlhf_ray.storage.manifest import FileRecord, hash_files

CrashEverywhere = Callable[[Path, Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]


def save(store: CheckpointStore, step: int) -> None:
    pending = store.begin(step)
    (pending.path / "policy").mkdir()
    (pending.path / "policy" / "rank-0.safetensors").write_bytes(b"weights of step %d" % step)
    store.commit(pending, {"weight_version": step * 2})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def weights_of(store: CheckpointStore, step: int) -> Path:
    return store.checkpoint_path(step) / "policy" / "rank-0.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_a_committed_checkpoint_comes_back_with_what_was_said_of_it(store: CheckpointStore) -> None:
    assert store.latest_valid() is None
    save(store, 10)
    checkpoint = store.latest_valid()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.path) == (10, store.directory / "step-000010")
    assert dict(checkpoint.manifest.about) == {"step": 10, "weight_version": 20}
    assert (checkpoint.path / "policy" / "rank-0.safetensors").read_bytes() == b"weights of step 10"
    assert json.loads((checkpoint.path / "manifest.json").read_text())["about"]["step"] == 10


def test_several_processes_write_one_checkpoint(store: CheckpointStore) -> None:
    pending = store.begin(5)
    script = "import pathlib, sys; pathlib.Path(sys.argv[1], 'rank-' + sys.argv[2]).write_text(sys.argv[2])"
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(pending.path), str(rank)]) for rank in range(3)]
    assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    checkpoint = store.commit(pending, hashed=hash_files(pending.path, [f"rank-{rank}" for rank in range(3)]))
    assert sorted(checkpoint.manifest.files) == ["rank-0", "rank-1", "rank-2"]


def test_a_rank_on_a_disk_of_its_own_is_found_out_before_the_commit(store: CheckpointStore) -> None:
    save(store, 5)
    pending = store.begin(6)
    with pytest.raises(StorageError, match="rank-1: every node must see the same directory"):
        store.commit(pending, hashed={"rank-1": FileRecord(4, "0" * 64)})
    assert store.steps() == [5]
    assert os.listdir(store.directory) == ["step-000005"]


def test_the_same_step_is_not_committed_twice(store: CheckpointStore) -> None:
    save(store, 5)
    with pytest.raises(StorageError, match="step-000005 exists already"):
        store.begin(5)


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 5]), (2, [4, 5]), (3, [3, 4, 5])])
def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path, keep: int, left: list[int]) -> None:
    store = CheckpointStore(tmp_path, keep)
    for step in range(1, 6):
        save(store, step)
        assert len(store.steps()) >= min(step, 2)
    assert store.steps() == left


def test_a_bad_checkpoint_is_set_aside_and_the_one_before_is_used(store: CheckpointStore) -> None:
    save(store, 10)
    save(store, 20)
    flip(weights_of(store, 20))
    checkpoint = store.latest_valid()
    assert checkpoint is not None and checkpoint.step == 10
    assert sorted(os.listdir(store.directory)) == ["step-000010", "step-000020.bad"]
    save(store, 20)  # the step runs again and finds its name free
    flip(weights_of(store, 20))
    assert store.latest_valid() == checkpoint
    assert sorted(os.listdir(store.directory)) == ["step-000010", "step-000020.bad", "step-000020.bad-2"]


def test_every_kind_of_damage_sends_the_run_to_the_checkpoint_before(store: CheckpointStore) -> None:
    damages: list[Callable[[], object]] = [
        lambda: flip(weights_of(store, 2)),
        lambda: os.truncate(weights_of(store, 2), 4),
        lambda: weights_of(store, 2).unlink(),
        lambda: (store.checkpoint_path(2) / "manifest.json").unlink(),
        lambda: os.truncate(store.checkpoint_path(2) / "manifest.json", 20),
        lambda: (store.checkpoint_path(2) / "global_step2").write_text("a stray file that a loader might pick up"),
        lambda: os.rename(store.checkpoint_path(2), store.checkpoint_path(3)),
    ]
    for damage in damages:
        shutil.rmtree(store.directory, ignore_errors=True)
        save(store, 1)
        save(store, 2)
        damage()
        checkpoint = store.latest_valid()
        assert checkpoint is not None and checkpoint.step == 1


def test_when_none_is_whole_the_run_does_not_silently_begin_again(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    flip(weights_of(store, 1))
    flip(weights_of(store, 2))
    for _ in range(2):  # the second look finds only what the first has set aside
        with pytest.raises(IntegrityError, match=r"step-000001\.bad, step-000002\.bad are damaged"):
            store.latest_valid()
    for path in store.directory.iterdir():
        shutil.rmtree(path)
    assert store.latest_valid() is None


def test_retention_counts_only_checkpoints_whose_files_are_there_in_their_sizes(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    os.truncate(weights_of(store, 2), 4)
    save(store, 3)
    assert store.steps() == [1, 3], "the first is still needed: the second is worth nothing"
    save(store, 4)
    assert store.steps() == [3, 4]


def test_a_commit_reads_no_file_of_the_ranks_and_of_no_older_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(store, step)
    pending = store.begin(3)
    (pending.path / "rank-0").write_bytes(b"a large file")
    hashed = hash_files(pending.path)
    read, file_digest = list[str](), hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        read.append(stream.name)
        return file_digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    store.commit(pending, hashed=hashed)
    assert read == [] and store.steps() == [2, 3]
    assert store.latest_valid() is not None and read == [str(store.checkpoint_path(3) / "rank-0")]


def test_a_byte_that_changed_since_is_found_when_the_run_goes_on(
    store: CheckpointStore, project_log: io.StringIO
) -> None:
    """Also where the rank that wrote it said another hash than its file has."""
    save(store, 1)
    pending = store.begin(2)
    (pending.path / "rank-0").write_bytes(b"what was written")
    store.commit(pending, hashed={"rank-0": FileRecord(16, "0" * 64)})
    flip(weights_of(store, 1))
    save(store, 3)
    assert store.steps() == [2, 3], "a commit does not read"
    flip(weights_of(store, 3))
    with pytest.raises(IntegrityError, match=r"step-000002\.bad, step-000003\.bad are damaged"):
        store.latest_valid()
    said = project_log.getvalue()
    assert "rank-0 has different content" in said and "policy/rank-0.safetensors has different content" in said


def test_going_on_reads_the_older_checkpoints_before_it_removes_one(store: CheckpointStore) -> None:
    store.keep = 3
    for step in (1, 2, 3):
        save(store, step)
    flip(weights_of(store, 2))
    store.keep = 2
    store.retain(3)
    assert store.steps() == [1, 3], "the second is worth nothing"


def test_the_newest_checkpoint_from_before_a_skipped_update_stays_besides(store: CheckpointStore) -> None:
    store.keep = 5
    for step in range(1, 6):
        save(store, step)
    store.keep = 2
    store.retain(5, before=3)
    assert store.steps() == [2, 4, 5]
    store.commit(store.begin(6), about={SKIPPED_SINCE: 3})
    assert store.steps() == [2, 5, 6]
    save(store, 7)
    assert store.steps() == [6, 7], "until there is nothing to go back before"


def test_a_failed_commit_removes_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    save(store, 2)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk full"):
        save(store, 3)
    assert sorted(os.listdir(store.directory)) == ["step-000001", "step-000002"]


def test_a_crash_at_any_line_of_a_save_leaves_the_promised_number_of_valid_checkpoints(
    store: CheckpointStore, crash_everywhere: CrashEverywhere
) -> None:
    save(store, 1)
    save(store, 2)

    def observe() -> tuple[int, ...]:
        atomic.sweep(store.directory)
        steps = tuple(store.steps())
        assert all(store._verified(step) is not None for step in steps)
        assert sorted(os.listdir(store.directory)) == [f"step-{step:06d}" for step in steps]
        return steps

    seen = crash_everywhere(store.directory, lambda: save(store, 3), observe, [checkpoints, atomic, shutil])
    assert sorted(set(seen), key=seen.index) == [(1, 2), (1, 2, 3), (2, 3)]
