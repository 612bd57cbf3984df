"""How long an engine may take for an update of its weights: from the bytes that it reads, and how fast it read those before.

Invariants: the slowest update that was completed counts, and updates that read all weights are compared with such alone, since
what an engine does besides reading (it loads all weights whatever came) is not in proportion to the bytes. No deadline is below
the floor. Until an update of the same kind was completed, the deadline is that of any call.
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
    """The deadlines of one engine's updates."""

    def __init__(self, floor_s: float) -> None:
        """``floor_s`` is ``rollout.update_timeout_s``."""
        self._floor_s = floor_s
        self._slowest: dict[bool, float] = {}
        """Bytes per second, by whether all weights were read."""

    def took(self, update: Taken) -> None:
        """Count an update that was completed."""
        rate = update.nbytes / max(update.seconds, 1e-9)
        self._slowest[update.whole] = min(rate, self._slowest.get(update.whole, rate))

    def limit(self, ways: Mapping[bool, int]) -> Limit | None:
        """The deadline of a publication, whichever way the engine will take it; None while a rate is not known.

        ``ways`` are the bytes that it may read, by whether all weights are among them.
        """
        limits = [self._limit(whole, nbytes) for whole, nbytes in ways.items()]
        known = [limit for limit in limits if limit is not None]
        return max(known, key=lambda limit: limit.seconds) if len(known) == len(limits) else None

    def _limit(self, whole: bool, nbytes: int) -> Limit | None:
        rate = self._slowest.get(whole)
        if rate is None:
            return None
        expected = nbytes / rate
        text = (
            f"rollout.update_timeout_s, {self._floor_s:g}: {nbytes / MB:.1f} MB at {rate / MB:.1f} MB/s, the slowest update so "
            f"far, take {expected:.1f} s, and the deadline is {MARGIN:g} times as long, but never less than that key"
        )
        return Limit(max(self._floor_s, MARGIN * expected), text)
