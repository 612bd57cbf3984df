"""The checkpoints of a run: written whole, verified before anything in them is opened, and limited in number.

Invariants: a directory ``step-NNNNNN`` was committed, which means renamed into place with a manifest of its files.
:meth:`CheckpointStore.latest_valid` returns the newest one whose every byte is as it was then, and renames damaged ones so
that their names say so. A checkpoint is removed only after a commit, and only while at least ``keep`` newer ones (never
fewer than two) have all their files, in their sizes; the newest one from before the first skipped update, which a run may go
back to, stays besides. The bytes of a checkpoint are hashed once, by the ranks that wrote them, and read again when a run goes
on: with large models a commit that read older ones would take longer than the steps between.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.config.sections.run import LEAST_KEPT
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage import Manifest, PendingDirectory
from rlhf_ray.storage.manifest import FileRecord

BAD = ".bad"
SKIPPED_SINCE = "skipped_since"
"""In what a checkpoint says of itself: the step before which a commit is kept, to go back to."""
_COMMITTED = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``manifest.about`` holds what its writer passed to ``commit``, such as the driver's state."""

    step: int
    path: Path
    manifest: Manifest


class CheckpointStore:
    """The directory ``checkpoints/`` of a run. One process commits; any number of ranks may write the files."""

    def __init__(self, directory: str | Path, keep: int = LEAST_KEPT) -> None:
        self.directory = Path(directory)
        self.keep = max(keep, LEAST_KEPT)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` stands once it is committed."""
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, in ascending order; their files are not verified."""
        if not self.directory.is_dir():
            return []
        with storage.storage_errors(self.directory, "read"):
            matches = (_COMMITTED.fullmatch(name) for name in os.listdir(self.directory))
            return sorted(int(match[1]) for match in matches if match is not None)

    def begin(self, step: int) -> PendingDirectory:
        """A new empty directory, at its ``path``, into which all ranks write their part of the checkpoint of ``step``."""
        return storage.begin_directory(self.checkpoint_path(step))

    def commit(
        self,
        pending: PendingDirectory,
        about: Mapping[str, Any] | None = None,
        hashed: Mapping[str, FileRecord] | None = None,
    ) -> Checkpoint:
        """Commit a directory that :meth:`begin` returned, then remove checkpoints that are no longer needed.

        ``about`` is plain JSON, which ``Checkpoint.manifest.about`` returns with ``step`` added. ``hashed`` holds the files
        that the ranks wrote, relative to ``pending.path``; a missing one is an error. An error leaves nothing behind.
        """
        step = _parse_step(pending.target)
        manifest = storage.commit(pending, {**(about or {}), "step": step}, hashed=hashed)
        self.retain(step, contents=False, before=manifest.about.get(SKIPPED_SINCE, 0))
        return Checkpoint(step, pending.target, manifest)

    def remove(self, step: int) -> None:
        """Remove the checkpoint of ``step`` if there is one, and the directory of checkpoints if nothing else is in it."""
        if step in self.steps():
            storage.remove_directory(self.checkpoint_path(step))
        if not self.steps():
            storage.remove_empty([self.directory])

    def latest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or none if none was ever committed; damaged ones are renamed.

        Only the process that owns the run may call it. Raises :class:`IntegrityError` if there are checkpoints and none of
        them is whole.
        """
        for step in reversed(self.steps()):
            manifest = self._verified(step)
            if manifest is not None:
                return Checkpoint(step, self.checkpoint_path(step), manifest)
        bad = sorted(path.name for path in self.directory.glob(f"step-*{BAD}*"))
        if bad:
            raise IntegrityError(
                f"no checkpoint in {self.directory} is whole: {', '.join(bad)} are damaged and were set aside. "
                "Remove them to start again from step 0, or restore them under their first names from a backup"
            )
        return None

    def _verified(self, step: int, *, contents: bool = True) -> Manifest | None:
        """The manifest of a checkpoint if it is whole; otherwise the checkpoint is renamed, and there is none.

        Without ``contents`` it is whole if all its files are there in their sizes.
        """
        path = self.checkpoint_path(step)
        try:
            manifest = storage.verify(path, contents=contents)
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

    def retain(self, verified: int, *, contents: bool = True, before: int = 0) -> None:
        """Remove checkpoints older than the newest ``keep`` valid ones; ``verified`` is a step that was just verified.

        The newest one of a step ``before`` this one stays.

        Every commit ends with this, without reading their ``contents``. A resume does it too, for a crash that came between
        commit and removal, and reads them.
        """
        steps = self.steps()
        if len(steps) <= self.keep:
            return
        valid, held = 0, max((step for step in steps if step < before), default=0)
        for step in reversed(steps):
            if valid >= self.keep and step != held:
                storage.remove_directory(self.checkpoint_path(step))
            elif step == verified or self._verified(step, contents=contents) is not None:
                valid += 1


def _parse_step(target: Path) -> int:
    match = _COMMITTED.fullmatch(target.name)
    if match is None:
        raise ValueError(f"{target} is not the name of a checkpoint: make it with CheckpointStore.begin")
    return int(match[1])
