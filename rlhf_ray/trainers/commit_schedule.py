"""When a training run commits a checkpoint.

Invariants: a number of steps is kept to exactly, and 0 commits nothing on the way. Where the config names none, a run commits
after every tenth of its steps, but for the first time only as long as all that commits take is at most a hundredth of its time:
the seconds for which training stands still, and those of a processor that writers take beside it, which may be busy. Whatever
they take, it commits every quarter of an hour, but stands still for that no more than a tenth of its time. It begins none
while the one before is being written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PARTS = 10
"""A run that names no number of steps commits after each of so many parts of it."""
LONGEST_S = 900.0
"""And no later than so many seconds after the commit before."""
SHARE = 0.01
"""What commits may take of the time of an attempt, but for its first one and those that ``LONGEST_S`` asks for."""
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
    _before_s: float = field(default=0.0, init=False)
    """What all commits but the last took."""
    _beside_s: float = field(default=0.0, init=False)
    """What the writers of the last one took."""
    _at: float = field(init=False)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._at = self._began = self.clock()

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
        now = self.clock()
        if now - self._at < TIMES_ITS_LENGTH * self._took_s:
            return False
        if now - self._at >= LONGEST_S:
            return True
        one = self._took_s + self._beside_s
        fits = self._before_s + one + one <= SHARE * (now - self._began)  # the next one is taken to be like the last
        return fits and step - self.last >= -(-self.total // PARTS)  # rounded up

    def saved(self, step: int, took_s: float) -> None:
        """Take note that ``step`` was saved just now, for which training stood still for ``took_s`` seconds."""
        self._before_s += self._took_s + self._beside_s
        self.last, self._took_s, self._beside_s, self._at = step, took_s, 0.0, self.clock()

    def wrote(self, seconds: float) -> None:
        """Take note of the processor seconds that writing the step that was saved last took beside training."""
        self._beside_s = seconds
