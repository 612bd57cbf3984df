"""Whether a phase of a run has stalled, and what is to be done about it: the decision alone, without clocks or processes.

A phase is overdue when it takes ``FACTOR`` times its own median in this run, and at least the floor (``run.stall_floor_s``).
The same holds for a call to ranks and the median of calls of its kind. What has no median yet has the time of any call;
in a phase that has none, and of a kind that has none, a call has its own deadline and nothing else.

Invariants: a call is given up only where the phase is overdue and the call too, so that neither a slow step nor a long call
in a phase that goes on ends anything; the driver itself is given up only where it waits for no call and nothing has shown
progress for as long; one that was given up and is still there after another floor takes the driver with it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

FACTOR = 6.0
KEPT = 20
"""So many of the last durations make the median: answers grow in the course of a run."""


class Durations:
    """How long things of each kind have taken in this run, in seconds."""

    def __init__(self) -> None:
        self._last: dict[str, deque[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Note one that has ended."""
        self._last.setdefault(kind, deque(maxlen=KEPT)).append(seconds)

    def median(self, kind: str) -> float | None:
        """The median of the last ones; None before the first has ended."""
        return median(self._last[kind]) if kind in self._last else None


@dataclass(frozen=True)
class Limits:
    """How long something may take."""

    floor_s: float
    """``run.stall_floor_s``."""
    unknown_s: float
    """For what has no median yet: the larger of ``cluster.start_timeout_s`` and ``cluster.call_timeout_s``."""

    def of(self, usual_s: float | None) -> float:
        """The limit of what usually takes so long; None where that is not known."""
        return self.unknown_s if usual_s is None else max(FACTOR * usual_s, self.floor_s)


@dataclass(frozen=True)
class OpenPhase:
    """A phase that has begun and not ended; times are of one monotonic clock."""

    name: str
    entered_at: float
    usual_s: float | None


@dataclass(frozen=True)
class OpenCall:
    """A call to ranks that some of them have not answered."""

    role: str
    method: str
    began_at: float
    usual_s: float | None
    missing: tuple[int, ...]
    """The ranks that have not answered."""
    number: int = 0
    """Tells it from every other call."""
    given_up_at: float | None = None

    def line(self, now: float) -> str:
        """What it is, for a person."""
        usual = "the first of its kind" if self.usual_s is None else f"usually {self.usual_s:.1f} s"
        ranks = ", ".join(map(str, self.missing))
        return f"{self.role}.{self.method}: no answer of rank {ranks} for {now - self.began_at:.0f} s ({usual})"


class Entry:
    """A call in a :class:`CallBook`; it is in it for as long as somebody holds it."""

    def __init__(self, method: str, handles: Sequence[Any], began_at: float, number: int, usual: bool) -> None:
        self.method, self.handles, self.began_at, self.number, self.usual = method, handles, began_at, number, usual
        self.has_ended = False
        self.given_up_at: float | None = None


class CallBook:
    """The calls to the ranks of one role, and how long those took that have ended. For any thread."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._durations = Durations()
        self._entries: weakref.WeakSet[Entry] = weakref.WeakSet()
        self._numbers = count(1)
        self._lock = threading.Lock()

    def begin(self, method: str, handles: Sequence[Any], now: float, *, usual: bool = True) -> Entry:
        """A call that begins now; ``handles`` are those of the answers, in rank order.

        One that is not ``usual`` says nothing of how long another takes, such as one that may wait for a process to start.
        """
        with self._lock:
            entry = Entry(method, handles, now, next(self._numbers), usual)
            self._entries.add(entry)
        return entry

    def end(self, entry: Entry, now: float) -> None:
        """All answers are there, now or since :meth:`open` saw them."""
        with self._lock:
            if entry.usual and not entry.has_ended:
                self._durations.add(entry.method, now - entry.began_at)
            entry.has_ended = True

    def fail(self, entry: Entry) -> None:
        """The call has ended without its answers: how long it took says nothing."""
        with self._lock:
            entry.has_ended = True

    def open(self, unanswered: Callable[[Sequence[Any]], tuple[int, ...]], now: float) -> list[OpenCall]:
        """The calls that have not ended; ``unanswered`` says of which handles the answer is missing."""
        with self._lock:
            entries = [entry for entry in self._entries if not entry.has_ended]
        calls = []
        for entry in sorted(entries, key=lambda entry: entry.number):
            if missing := unanswered(entry.handles):
                usual = self._durations.median(entry.method)
                given_up = entry.given_up_at
                calls.append(OpenCall(self.role, entry.method, entry.began_at, usual, missing, entry.number, given_up))
            else:
                self.end(entry, now)
        return calls

    def give_up(self, number: int, now: float) -> None:
        """Note that the missing ranks of a call were ended."""
        with self._lock:
            for entry in self._entries:
                if entry.number == number:
                    entry.given_up_at = now


@dataclass(frozen=True)
class Verdict:
    """What is to be done now."""

    notice: tuple[OpenPhase, ...] = ()
    """Phases that have become overdue: their stacks are written, once."""
    give_up: tuple[OpenCall, ...] = ()
    """Calls whose missing ranks are to be ended."""
    end_driver: str = ""
    """Why the driver is to end, and another one to begin; empty where it is not."""


def judge(
    now: float,
    phases: Sequence[OpenPhase],
    calls: Iterable[OpenCall],
    *,
    progress_at: float,
    limits: Limits,
    noticed: Collection[OpenPhase] = (),
) -> Verdict:
    """What to do at ``now``, where something last showed progress at ``progress_at`` and ``noticed`` phases are known."""
    calls = list(calls)
    overdue = [one for one in phases if now - one.entered_at >= limits.of(one.usual_s)]
    notice = tuple(one for one in overdue if one not in noticed)
    for call in calls:
        if call.given_up_at is not None and now - call.given_up_at >= limits.floor_s:
            return Verdict(notice, end_driver=f"its ranks were ended, and the call has not: {call.line(now)}")
    if not overdue:
        return Verdict()
    if calls:
        late = [call for call in calls if call.usual_s is not None and now - call.began_at >= limits.of(call.usual_s)]
        # Where it is not known how long the phase takes, calls may be larger than those that the median knows.
        known = any(phase.usual_s is not None for phase in overdue)
        return Verdict(notice, give_up=tuple(call for call in late if known and call.given_up_at is None))
    for phase in overdue:
        silent_s = now - max(progress_at, phase.entered_at)
        if silent_s >= limits.of(phase.usual_s):
            return Verdict(
                notice, end_driver=f"the driver waits for no rank and has shown no progress for {silent_s:.0f} s"
            )
    return Verdict(notice)


def seeded(lines: Iterable[Mapping[str, object]]) -> Durations:
    """The durations that the metrics of earlier attempts of a run tell, a step's time in a phase as one."""
    durations = Durations()
    for line in list(lines)[-KEPT:]:
        for name, value in line.items():
            if name.startswith("time/") and isinstance(value, int | float):
                durations.add(name.removeprefix("time/"), float(value))
    return durations
