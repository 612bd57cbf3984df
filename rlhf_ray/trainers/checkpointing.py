"""Save everything that a training run needs to go on after a kill, and load it again.

Invariants: a checkpoint holds the driver's state and the shards of every trained group, or it does not exist. That is so
even where a rank wrote to a disk that the driver does not see: the checkpoint is then refused. Restoring returns the
driver's state only after every group has loaded its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.actors.groups import Group
from rlhf_ray.config.sections.run import CheckpointConfig
from rlhf_ray.console import get_logger
from rlhf_ray.engine.shards import expected_files
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory


class Checkpointer:
    """Writes the checkpoints and the final models of one run; ``checkpoint`` is the one that the run goes on from."""

    def __init__(
        self, run: RunDirectory, config: CheckpointConfig, groups: Mapping[str, Group], checkpoint: Checkpoint | None
    ) -> None:
        self.run = run
        self.every = config.every_steps
        self.groups = dict(groups)
        self.checkpoint = checkpoint

    def is_due(self, step: int) -> bool:
        """Whether ``checkpoint.every_steps`` asks for a checkpoint after ``step``."""
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write ``state``, which is plain JSON, and the shards of every group as the checkpoint of ``step``."""
        pending = self.run.checkpoints.begin(step)
        try:
            for saving in [group.save(str(pending.path / name)) for name, group in self.groups.items()]:
                saving.result()
        except BaseException:
            pending.abort()
            raise
        expected = [f"{name}/{file}" for name, group in self.groups.items() for file in expected_files(group.size)]
        self.run.checkpoints.commit(pending, about={"state": dict(state)}, expected=expected)

    def save_final(self, parts: Mapping[str, tuple[Group, Mapping[str, Any]]]) -> None:
        """Write ``final/``, whole or not at all.

        ``parts`` maps a directory below ``final/`` (``""`` is ``final/`` itself) to the group whose model is written there
        as a Hugging Face directory, and to facts that its ``config.json`` gets besides.
        """
        pending = self.run.begin_final()
        try:
            for place, (group, metadata) in parts.items():
                group.save_pretrained(str(pending.path / place), dict(metadata)).result()
        except BaseException:
            pending.abort()
            raise
        storage.commit(pending, expected=[str(Path(place) / "config.json") for place in parts])

    def restore(self) -> dict[str, Any] | None:
        """Load the checkpoint into every group and return the driver's state; none where the run starts from the beginning."""
        if self.checkpoint is None:
            return None
        for loading in [group.load(str(self.checkpoint.path / name)) for name, group in self.groups.items()]:
            loading.result()
        get_logger("runs").info("going on after step %d", self.checkpoint.step)
        state: dict[str, Any] = self.checkpoint.manifest.about["state"]
        return state
