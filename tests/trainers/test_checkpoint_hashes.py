"""The driver joins the hashes of checkpoints and models, which the ranks that wrote the files have made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray import storage
from rlhf_ray.actors.groups import Group
from rlhf_ray.config.sections.run import CheckpointConfig
from rlhf_ray.engine.saving.room import Room
from rlhf_ray.engine.saving.writer import Written
from rlhf_ray.errors import StorageError
from rlhf_ray.pending import Pending
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.manifest import FileRecord, hash_files
from rlhf_ray.trainers.checkpointing import Checkpointer


class Ranks:
    """Two ranks, each of which writes a file and hashes it; ``sees`` is what the driver's node shows of the second."""

    role, size = "policy", 2

    def __init__(self, sees: bool = True) -> None:
        self.hashing, self.sees = False, sees

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], **options: Any) -> Pending[list[Any]]:
        return Pending.done([getattr(self, method)(rank, *own) for rank, own in enumerate(arguments)])

    def save(self, rank: int, directory: str) -> dict[str, FileRecord]:
        path = Path(directory) / f"rank-{rank}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the state of rank {rank}")
        records = self._hashed(Path(directory), [path.name])
        if rank == 1 and not self.sees:
            path.unlink()
        return records

    def room_to_save(self, rank: int) -> Room:
        return Room("here", 1, 2)

    def begin_save(self, rank: int, directory: str) -> None:
        self.directory = directory

    def saved(self, rank: int) -> Written:
        return Written(self.save(rank, self.directory), 0.0)

    def save_pretrained(self, rank: int, directory: str, metadata: object) -> None:
        if rank == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / "config.json").write_text("{}")

    def hash_files(self, rank: int, directory: str) -> dict[str, FileRecord]:
        return self._hashed(Path(directory), None) if rank == 0 else {}

    def _hashed(self, directory: Path, names: list[str] | None) -> dict[str, FileRecord]:
        self.hashing = True
        try:
            return hash_files(directory, names)
        finally:
            self.hashing = False


def checkpointer(run: RunDirectory, **groups: Ranks) -> Checkpointer:
    return Checkpointer(run, CheckpointConfig(), {name: Group(ranks) for name, ranks in groups.items()}, None, 9)


def test_the_driver_hashes_no_byte_of_a_checkpoint_or_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, read, file_digest = Ranks(), list[str](), hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        if not ranks.hashing:
            read.append(stream.name)
        return file_digest(stream, name)

    run = RunDirectory.create(tmp_path / "run", "kind: ppo\n")
    saving = checkpointer(run, policy=ranks, critic=ranks)
    monkeypatch.setattr(hashlib, "file_digest", counted)
    for step in (1, 2, 3):
        saving.save(step, {"step": step})
    saving.settle()
    saving.save_final(3, {"": (saving.groups["policy"], {}), "critic": (saving.groups["critic"], {})})
    assert read == []
    checkpoint = run.checkpoints.latest_valid()
    assert checkpoint is not None and checkpoint.step == 3
    assert sorted(checkpoint.manifest.files) == ["critic/rank-0", "critic/rank-1", "policy/rank-0", "policy/rank-1"]
    assert sorted(storage.verify(run.final).files) == ["config.json", "critic/config.json"]
    assert len(read) == 6, "whoever goes on reads them"


def test_what_a_rank_wrote_to_a_disk_of_its_own_is_missed(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "kind: ppo\n")
    with pytest.raises(StorageError, match=r"1 of 2 files .* missing, such as policy/rank-1: every node must see"):
        saving = checkpointer(run, policy=Ranks(sees=False))
        saving.save(1, {})
        saving.settle()
    assert run.checkpoints.steps() == []
