"""What a tracker is to the process that feeds it.

Invariant: a tracker that is opened says which steps of a curve it has, so that each step is sent once however the process
before ended. It may raise whatever it likes, hang, or end the process: it has one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf_ray.config.shown import Scalar
from rlhf_ray.trackers.rows import RUN, Row


@dataclass(frozen=True)
class Curve:
    """One curve of a run, which is a run of its own to the tracker."""

    run: str
    """The name of the run."""
    id: str
    """What tells the run from all others, also from those of the same name: letters and digits."""
    key: str
    """``run``, or ``attempt-N``."""
    project: str
    directory: Path
    """The run directory."""
    config: Mapping[str, Scalar]

    @property
    def name(self) -> str:
        """What people see."""
        return self.run if self.key == RUN else f"{self.run}/{self.key}"

    @property
    def unique(self) -> str:
        """What no other curve has, of letters that are allowed in file names and URLs."""
        return f"{self.run}-{self.id}" + ("" if self.key == RUN else f"-{self.key}")

    @property
    def group(self) -> str | None:
        """What the curves of the attempts of one run have in common."""
        return None if self.key == RUN else self.run


class Tracker(Protocol):
    """Takes the curves of a run, one after another, each with rising steps."""

    def open(self, curve: Curve) -> int:
        """Begin a curve, or go on with it; returns the last step that it has, or -1."""

    def log(self, row: Row) -> None:
        """Take the row of a step."""

    def flush(self) -> None:
        """Return once what was logged is kept, also if this process is killed now."""

    def close(self, *, finished: bool) -> None:
        """End the curve; ``finished`` says that nothing will come any more."""
