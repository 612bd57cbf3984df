"""Keep the model of the best evaluation so far, besides that of the last update.

Invariants: ``best/`` holds the weights of the update that the run's state names as the best, or does not exist. A kill at any
moment does not change that: a resumed run finds ``best/`` as its checkpoint says, writes it again, or removes it. Of two
equally good evaluations the earlier counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.manifest import FileRecord


@dataclass(frozen=True)
class BestSoFar:
    """An update and the figures of its evaluation."""

    update: int
    figures: dict[str, float]


class Best:
    """Keeps the weights of the update with the highest ``figure`` in its evaluation.

    ``save(pending, figures)`` fills a directory with the weights as they are at that moment, and returns the records of its
    files.
    """

    def __init__(
        self,
        run: RunDirectory,
        figure: str,
        save: Callable[[storage.PendingDirectory, Mapping[str, float]], dict[str, FileRecord]],
    ) -> None:
        self.run = run
        self.figure = figure
        self.so_far: BestSoFar | None = None
        self._save = save

    def improves(self, update: int, figures: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; if so it becomes the one to beat."""
        value = figures.get(self.figure)
        if value is None or (self.so_far is not None and value <= self.so_far.figures[self.figure]):
            return False
        self.so_far = BestSoFar(update, dict(figures))
        return True

    def keep(self) -> None:
        """Write the current weights, which must be those of the best update, in place of the older ``best/``."""
        assert self.so_far is not None
        pending = self.run.begin_best()
        try:
            hashed = self._save(pending, self.so_far.figures)
        except BaseException:
            pending.abort()
            raise
        storage.commit(pending, {"update": self.so_far.update}, ["config.json"], hashed)

    def state(self) -> dict[str, Any] | None:
        """The best evaluation so far as plain JSON, for a checkpoint; none before the first."""
        return None if self.so_far is None else asdict(self.so_far)

    def restore(self, state: Mapping[str, Any] | None, update: int, evaluated: Mapping[str, float]) -> None:
        """Go on from a checkpoint of ``update`` that held ``state``; at the start of a run these are 0 and none.

        ``evaluated`` are the figures of that update, if it was evaluated. Where it ended a shorter run and was its best, its
        weights are in no ``best/``, but here they are again.
        """
        self.so_far = None if state is None else BestSoFar(**state)
        if self.improves(update, evaluated):
            self.keep()
            return
        kept = self._kept_update()
        if self.so_far is None:
            if kept is not None:
                self.remove()
            return
        if kept == self.so_far.update:
            return
        if self.so_far.update == update:  # killed after the checkpoint was written and before the weights were
            self.keep()
            return
        get_logger("runs").warning(
            "best/ does not hold update %d, which was the best: it is removed", self.so_far.update
        )
        self.so_far = None
        self.remove()

    def remove(self) -> None:
        """Delete ``best/`` if it exists."""
        if self.run.best.exists():
            storage.remove_directory(self.run.best)

    def _kept_update(self) -> int | None:
        """The update in ``best/``; none where there is no ``best/``, and -1, which is not an update, if it is damaged."""
        if not self.run.best.exists():
            return None
        try:
            return int(storage.read_manifest(self.run.best).about["update"])
        except (IntegrityError, StorageError, KeyError):
            return -1
