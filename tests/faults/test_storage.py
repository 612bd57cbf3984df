"""Faults at file operations of a real save and flipped bits: a fixed sample of ``python -m tests.faults.storage``."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import storage
from tests.faults.power_cut import LOSSES, Loss, Unsynced, cut, inodes
from tests.faults.storage import STEPS, Saved, Tally
from tests.faults.syscalls import FileOperations, Order, possible
from tests.trainers.small_runs import signals_as_before

pytestmark = [
    pytest.mark.early,
    pytest.mark.skipif(not possible(), reason="this machine lets no process watch its file operations"),
]
SAMPLE = 2
"""Faults of each error that are tried here."""
EVERY = 15
"""Of the states that a crash may leave, each so-many-th is looked at here."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    with signals_as_before(), storage.quiet():
        yield Saved.train(tmp_path_factory.mktemp("saved"), "sft")


@pytest.fixture(scope="module")
def operations() -> Iterator[FileOperations]:
    with FileOperations() as operations:
        yield operations


def test_a_kill_or_a_power_cut_before_any_file_operation_of_a_save_leaves_whole_checkpoints(
    saved: Saved, operations: FileOperations
) -> None:
    tally = Tally()
    made = storage.crashes(saved, operations, tally, ("nothing", "bytes and names"), EVERY)
    calls = {one.call for one in made}
    assert {"fsync", "rename", "renameat2", "sendfile", "writev"} <= calls, "Python's, torch's and safetensors' calls"
    assert len(made) >= 200 and sum(tally.tried.values()) >= 9
    assert tally.troubles == []


@pytest.mark.parametrize("code", storage.FAULTS, ids=errno.errorcode.get)
def test_a_disk_that_fails_at_a_file_operation_ends_the_save_by_name_and_costs_nothing_committed(
    saved: Saved, operations: FileOperations, code: int
) -> None:
    tally = Tally()
    saved.put_back()
    made, error = operations.run(saved.saving(), Order(str(saved.path)))
    assert error is None
    points = [point for point in storage.points(made) if point[1] == code]
    for at, _ in points[:: len(points) // SAMPLE]:
        storage.fault(saved, operations, tally, at, code, load=False)
    assert tally.troubles == []
    assert tally.endings["StorageError"] + tally.endings["DiskFullError"] >= 1, tally.endings


def test_a_flipped_bit_is_found_wherever_it_is(saved: Saved) -> None:
    tally = Tally()
    storage.flipped_bits(saved, 50, random.Random(0), tally)
    assert tally.tried["flipped bit"] == 50 and tally.troubles == []


def test_what_goes_on_loads_what_was_committed(saved: Saved) -> None:
    saved.put_back()
    saved.saving()()
    assert storage.troubles(saved, must_be=STEPS + 1) == []


KEPT: dict[Loss, dict[str, bytes]] = {
    "nothing": {"new/a": b"whole", "moved": b"old"},
    "bytes": {"new/a": b"wh", "moved": b"old"},
    "names": {"file": b"old", "gone": b"g"},
    "bytes and names": {"file": b"old", "gone": b"g"},
    "zeros": {"new/a": bytes(5), "moved": b"old"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cut_takes_what_was_not_flushed_and_nothing_else(loss: Loss, tmp_path: Path) -> None:
    root, unsynced = tmp_path / "root", Unsynced()
    root.mkdir()
    (root / "file").write_bytes(b"old")
    (root / "gone").write_bytes(b"g")
    (root / "new").mkdir()
    unsynced.made(str(root / "new"))
    (root / "new" / "a").write_bytes(b"wh")
    unsynced.made(str(root / "new" / "a"))
    unsynced.flushed((root / "new" / "a").stat().st_ino)
    unsynced.written(str(root / "new" / "a"))
    (root / "new" / "a").write_bytes(b"whole")
    unsynced.renamed(str(root / "file"), str(root / "moved"))
    os.rename(root / "file", root / "moved")
    unsynced.removed(str(root / "gone"))
    (root / "gone").unlink()
    cut(root, inodes(root), unsynced, loss)
    assert {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()} == KEPT[loss]
    unsynced.flushed(root.stat().st_ino)
    assert [change.name for change in unsynced.changes] == ["a"], "its directory was flushed, and not those below it"
