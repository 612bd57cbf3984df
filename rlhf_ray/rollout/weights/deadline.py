"""How long an engine may take for an update of its weights: from the bytes that it reads, and how fast it read those before.

Invariants: updates that read all weights take time in proportion to their bytes, by the slowest rate so far. The others read
changes or an adapter, and much of what an engine does then has nothing to do with their bytes: it loads all weights whatever
came. They take as long as the longest so far, and what more bytes than ever before take at the rate of whole updates. No
deadline is below the floor. Until enough is known, the deadline is that of any call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MARGIN = 10.0
"""How many times as long as by the slowest rate an update may take."""
MB = 1e6


@dataclass(frozen=True)
class Taken:
    """An update that an engine has completed."""

    whole: bool
    """Whether all weights were read, and not only what changed or an adapter."""
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Limit:
    """A deadline in seconds, and the key with which to raise it, as it stands in an error."""

    seconds: float
    key: str


class UpdateDeadline:
    """The deadlines of the updates of one process."""

    def __init__(self, floor_s: float) -> None:
        """``floor_s`` is ``rollout.update_timeout_s``."""
        self._floor_s = floor_s
        self._slowest: float | None = None
        """Bytes per second of updates that read all weights."""
        self._longest_s: float | None = None
        """Seconds of the others."""
        self._most_bytes = 0
        """Of the others."""

    def took(self, update: Taken) -> None:
        """Count an update that was completed."""
        if update.whole:
            rate = max(update.nbytes, 1) / max(update.seconds, 1e-9)
            self._slowest = rate if self._slowest is None else min(rate, self._slowest)
        else:
            self._longest_s = max(self._longest_s or 0.0, update.seconds)
            self._most_bytes = max(self._most_bytes, update.nbytes)

    def limit(self, ways: Mapping[bool, int]) -> Limit | None:
        """The deadline of a publication, whichever way the engine will take it; None while too little is known.

        ``ways`` are the bytes that it may read, by whether all weights are among them.
        """
        limits = [
            self._limit_of_whole(nbytes) if whole else self._limit_of_part(nbytes) for whole, nbytes in ways.items()
        ]
        known = [limit for limit in limits if limit is not None]
        return max(known, key=lambda limit: limit.seconds) if len(known) == len(limits) else None

    def _limit_of_whole(self, nbytes: int) -> Limit | None:
        if self._slowest is None:
            return None
        expected_s = nbytes / self._slowest
        rate = f"at {self._slowest / MB:.1f} MB/s, the slowest update so far"
        return self._limit(expected_s, f"{nbytes / MB:.1f} MB {rate}, take {expected_s:.1f} s")

    def _limit_of_part(self, nbytes: int) -> Limit | None:
        more = max(nbytes - self._most_bytes, 0)
        if self._longest_s is None or (more and self._slowest is None):
            return None
        expected_s = self._longest_s + (more / self._slowest if self._slowest else 0.0)
        return self._limit(
            expected_s,
            f"{nbytes / MB:.1f} MB of changes or an adapter take {expected_s:.1f} s by the longest update so far, "
            f"{self._longest_s:.1f} s",
        )

    def _limit(self, expected_s: float, why: str) -> Limit:
        text = (
            f"rollout.update_timeout_s, {self._floor_s:g}: {why}, and the deadline is {MARGIN:g} times as long, but never less "
            "than that key"
        )
        return Limit(max(self._floor_s, MARGIN * expected_s), text)
