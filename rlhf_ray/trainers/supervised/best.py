"""The best model so far, kept beside the last.

Always true: ``best/`` holds the weights of the update that the run's state names as the best, or is not there: after a kill
at any moment it is either of a state that was committed, or written again from it, or removed. Ties go to the earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.runs.directory import RunDirectory


@dataclass(frozen=True)
class BestSoFar:
    """An update and what its evaluation said."""

    update: int
    figures: dict[str, float]


class Best:
    """Keeps the weights of the update whose evaluation had the most of ``figure``.

    ``save(pending, figures)`` fills a directory with the weights as they are now.
    """

    def __init__(
        self, run: RunDirectory, figure: str, save: Callable[[storage.PendingDirectory, Mapping[str, float]], None]
    ) -> None:
        self.run = run
        self.figure = figure
        self.so_far: BestSoFar | None = None
        self._save = save

    def improves(self, update: int, figures: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best one so far; then it is remembered."""
        value = figures.get(self.figure)
        if value is None or (self.so_far is not None and value <= self.so_far.figures[self.figure]):
            return False
        self.so_far = BestSoFar(update, dict(figures))
        return True

    def keep(self) -> None:
        """Write the weights of the best update, which is this one, in the place of the older best."""
        assert self.so_far is not None
        pending = self.run.begin_best()
        try:
            self._save(pending, self.so_far.figures)
        except BaseException:
            pending.abort()
            raise
        storage.commit(pending, about={"update": self.so_far.update}, expected=["config.json"])

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold."""
        return None if self.so_far is None else asdict(self.so_far)

    def restore(self, state: Mapping[str, Any] | None, update: int) -> None:
        """Go on from a checkpoint of ``update`` that held ``state``; none of both at the start of a run."""
        self.so_far = None if state is None else BestSoFar(**state)
        kept = self._kept_update()
        if self.so_far is None or kept == self.so_far.update:
            if kept is not None and self.so_far is None:
                self.remove()
            return
        if self.so_far.update == update:  # the checkpoint was committed, the weights were not kept yet
            self.keep()
            return
        get_logger("runs").warning("best/ is not of update %d, which was the best: it is void", self.so_far.update)
        self.so_far = None
        self.remove()

    def remove(self) -> None:
        """Forget ``best/``."""
        if self.run.best.exists():
            storage.remove_directory(self.run.best)

    def _kept_update(self) -> int | None:
        if not self.run.best.exists():
            return None
        try:
            return int(storage.read_manifest(self.run.best).about["update"])
        except (IntegrityError, StorageError, KeyError):
            return -1
