"""When a training run commits a checkpoint.

Invariants: a number of steps is kept to exactly, and 0 commits nothing on the way. Where the config names none, a run commits
after every tenth of its steps and every quarter of an hour, whichever comes first, but stands still for commits no more than a
tenth of its time, and begins none while the one before is being written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PARTS = 10
"""A run that names no number of steps commits after each of so many parts of it."""
LONGEST_S = 900.0
"""And no later than so many seconds after the commit before."""
TIMES_ITS_LENGTH = 9.0
"""But not before so many times the seconds for which training stood still at the last commit have passed since it."""


@dataclass
class CommitSchedule:
    """The steps of one attempt after which a checkpoint is due; ``every`` is ``checkpoint.every_steps``."""

    every: int | None
    total: int
    """Steps of the whole run."""
    last: int = 0
    """The last step that was saved; 0 before the first."""
    clock: Callable[[], float] = time.monotonic
    busy: Callable[[], bool] = lambda: False
    """Whether a checkpoint is still being written; where the config names no number, the next one waits for it."""
    _took_s: float = field(default=0.0, init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._at = self.clock()

    @property
    def commits_on_the_way(self) -> bool:
        """Whether a run commits before its last step without being asked to stop."""
        return self.every != 0

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step``."""
        if self.every is not None:
            return self.every > 0 and step % self.every == 0
        if self.busy():
            return False
        passed = self.clock() - self._at
        if passed < TIMES_ITS_LENGTH * self._took_s:
            return False
        return step - self.last >= -(-self.total // PARTS) or passed >= LONGEST_S  # rounded up

    def saved(self, step: int, took_s: float) -> None:
        """Take note that ``step`` was saved just now, for which training stood still for ``took_s`` seconds."""
        self.last, self._took_s, self._at = step, took_s, self.clock()
