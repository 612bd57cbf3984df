"""Checkpoints of a run: committed whole, verified before anything in them is opened, kept in number.

Always true: a directory ``step-NNNNNN`` was committed with a manifest; :meth:`CheckpointStore.latest_valid` returns the
newest whose every byte is as it was then, and gives the others a name that says that they are bad; retention removes a
checkpoint only after a commit, and only while at least ``keep`` verified newer ones (never fewer than two) remain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage import Manifest, PendingDirectory

LEAST_KEPT = 2
BAD = ".bad"
_COMMITTED = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``manifest.about`` holds what its writer said of it."""

    step: int
    path: Path
    manifest: Manifest


class CheckpointStore:
    """The directory ``checkpoints/`` of a run. One process commits; any number may write what it commits."""

    def __init__(self, directory: str | Path, keep: int = LEAST_KEPT) -> None:
        self.directory = Path(directory)
        self.keep = max(keep, LEAST_KEPT)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of ``step`` stands once it is committed."""
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending; their bytes are not looked at."""
        if not self.directory.is_dir():
            return []
        with storage.storage_errors(self.directory):
            found = (_COMMITTED.fullmatch(name) for name in os.listdir(self.directory))
            return sorted(int(match[1]) for match in found if match is not None)

    def begin(self, step: int) -> PendingDirectory:
        """An empty directory, ``.path``, into which all ranks may write their part of the checkpoint."""
        return storage.begin_directory(self.path_of(step))

    def commit(
        self, pending: PendingDirectory, about: Mapping[str, Any] | None = None, expected: Collection[str] = ()
    ) -> Checkpoint:
        """Commit what :meth:`begin` gave, then remove what is older than needed.

        ``about`` is plain JSON, found again in ``Checkpoint.manifest.about`` with ``step`` added; ``expected`` names
        the files that the ranks say they wrote, relative to ``pending.path``. On any error nothing is left behind.
        """
        step = _step_of(pending.target)
        manifest = storage.commit(pending, {**(about or {}), "step": step}, expected)
        self.retain(step)
        return Checkpoint(step, pending.target, manifest)

    def latest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or none where none was ever committed; bad ones are set aside.

        Only for the process that owns the run. ``IntegrityError`` when checkpoints were committed and none is whole.
        """
        for step in reversed(self.steps()):
            manifest = self._verified(step)
            if manifest is not None:
                return Checkpoint(step, self.path_of(step), manifest)
        bad = sorted(path.name for path in self.directory.glob(f"step-*{BAD}*"))
        if bad:
            raise IntegrityError(
                f"no checkpoint in {self.directory} is whole: {', '.join(bad)} are damaged and were set aside. "
                "Remove them to start again from step 0, or restore them under their first names from a backup"
            )
        return None

    def _verified(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint that is whole; one that is not is set aside."""
        path = self.path_of(step)
        try:
            manifest = storage.verify(path)
            if manifest.about.get("step") != step:
                raise IntegrityError(f"{path} was committed as step {manifest.about.get('step')}")
        except IntegrityError as error:
            get_logger("runs").error("%s; set aside as %s", error, self._set_aside(path).name)
            return None
        return manifest

    def _set_aside(self, path: Path) -> Path:
        for number in range(1, 1000):
            aside = path.with_name(f"{path.name}{BAD}{'' if number == 1 else f'-{number}'}")
            if not aside.exists():
                with storage.storage_errors(path):
                    os.rename(path, aside)
                return aside
        raise StorageError(f"{path} was set aside a thousand times: remove the directories {path.name}{BAD}-*")

    def retain(self, verified: int) -> None:
        """Remove what is older than the newest ``keep`` valid ones; ``verified`` was found whole a moment ago.

        Every commit ends with this, and a resume does it where a crash came between the two.
        """
        steps = self.steps()
        if len(steps) <= self.keep:
            return
        valid = 0
        for step in reversed(steps):
            if valid == self.keep:
                storage.remove_directory(self.path_of(step))
            elif step == verified or self._verified(step) is not None:
                valid += 1


def _step_of(target: Path) -> int:
    match = _COMMITTED.fullmatch(target.name)
    if match is None:
        raise ValueError(f"{target} is not the name of a checkpoint: make it with CheckpointStore.begin")
    return int(match[1])
