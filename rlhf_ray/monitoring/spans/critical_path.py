"""The critical path of a step: what it would have had to do sooner, to have ended sooner.

It is followed from the end of the step to its begin. While the driver worked, the path is with the driver. Where the driver
waited, it is with the rank whose answer came last, from when that rank had answered. A rank that was free when its call was
sent leads back to the driver at that moment; one that was busy leads to what it did before, since calls to a rank queue.

Invariants: the parts of the path follow one another without a gap or an overlap from the begin of the step to its end, so that
their lengths add up to it. A part of a lane lies in a span of that lane.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.monitoring.spans.lanes import WORK, Piece, driver_pieces
from rlhf_ray.monitoring.spans.records import DRIVER, Attempt, Span, role_of

DELIVERY = "delivery"
"""The role of calls and answers on their way."""
WAITING = "waiting"


@dataclass(frozen=True)
class Part:
    """A part of the path: what ``lane`` did from ``begin`` to ``end``."""

    lane: str
    name: str
    begin: int
    end: int

    @property
    def role(self) -> str:
        """Whose it is."""
        return role_of(self.lane)

    @property
    def length(self) -> int:
        """Microseconds."""
        return self.end - self.begin

    @property
    def label(self) -> str:
        """Role and what was done."""
        return DELIVERY if self.lane == DELIVERY else f"{self.role}: {self.name}"


def critical_path(attempt: Attempt, begin: int, end: int) -> list[Part]:
    """The path of a step that took from ``begin`` to ``end``, in order of time."""
    return follow(driver_pieces(attempt.driver, begin, end), list(attempt.calls()), begin, end)


def follow(driver: Sequence[Piece], calls: Iterable[Span], begin: int, end: int) -> list[Part]:
    """The path through the driver's pieces and what ranks did for calls."""
    answers = _Answers(calls)
    starts = [piece.begin for piece in driver]
    parts: list[Part] = []
    at = end
    while at > begin:
        piece = driver[bisect_left(starts, at) - 1]
        left = max(piece.begin, begin)
        last = None if piece.kind == WORK else answers.last(piece, at)
        if last is None:
            name = piece.name if piece.kind == WORK else f"{WAITING} for {piece.name}"
            parts.append(Part(DRIVER, name, left, at))
            at = left
            continue
        for part in _back(answers, last, at, begin):
            parts.append(part)
            at = part.begin
    return [part for part in reversed(_joined(parts)) if part.length]


def by_role(path: Iterable[Part]) -> dict[str, float]:
    """Seconds of a path by role."""
    return _sums((part.role, part.length) for part in path)


def by_label(path: Iterable[Part]) -> dict[str, float]:
    """Seconds of a path by role and what was done."""
    return _sums((part.label, part.length) for part in path)


class _Answers:
    """What ranks did, by call, by lane, and by when it ended."""

    def __init__(self, calls: Iterable[Span]) -> None:
        self._by_end = sorted(calls, key=lambda span: (span.end, span.begin))
        self._ends = [span.end for span in self._by_end]
        self._by_call: dict[str, list[Span]] = {}
        self._by_process: dict[tuple[str, str], list[Span]] = {}
        for span in self._by_end:
            self._by_call.setdefault(span.call, []).append(span)
            self._by_process.setdefault((span.process, span.lane), []).append(span)

    def last(self, wait: Piece, at: int) -> Span | None:
        """The answer that came last of those that the driver waited for at ``at``; none where none came in this wait."""
        if wait.calls:
            known = [span for call in wait.calls for span in self._by_call.get(call, ()) if wait.begin < span.end <= at]
            known = [span for span in known if span.begin < span.end]
            return max(known, key=lambda span: (span.end, -span.begin), default=None)
        for number in range(bisect_right(self._ends, at) - 1, -1, -1):
            span = self._by_end[number]
            if span.end <= wait.begin:
                return None
            if span.begin < span.end:
                return span
        return None

    def before(self, span: Span) -> Span | None:
        """What the same process did before, if it was still at it when the call of ``span`` was sent."""
        own = self._by_process[span.process, span.lane]
        number = bisect_right(own, span.begin, key=lambda other: other.end) - 1
        while number >= 0:
            other = own[number]
            if span.sent is None or other.end <= span.sent:
                return None
            if other is not span and other.begin < other.end:
                return other
            number -= 1
        return None


def _back(answers: _Answers, span: Span, at: int, begin: int) -> Iterator[Part]:
    """The path from the moment ``at``, at which the driver went on, back to where it sent the call."""
    while at > begin:
        if span.end < at:
            yield Part(DELIVERY, "answer", max(span.end, begin), at)
            at = max(span.end, begin)
        if span.begin < at:
            yield Part(span.lane, span.name, max(span.begin, begin), at)
            at = max(span.begin, begin)
        before = answers.before(span)
        if before is None:
            break
        span = before
    sent = span.begin if span.sent is None else min(span.sent, span.begin)
    if begin < at and sent < at:
        yield Part(DELIVERY, "call", max(sent, begin), at)


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Parts from the last to the first, with neighbours that are alike in one."""
    result: list[Part] = []
    for part in parts:
        if result and (result[-1].lane, result[-1].name, result[-1].begin) == (part.lane, part.name, part.end):
            result[-1] = Part(part.lane, part.name, part.begin, result[-1].end)
        elif part.length:
            result.append(part)
    return result


def _sums(lengths: Iterable[tuple[str, int]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, length in lengths:
        sums[name] = sums.get(name, 0.0) + length / 1e6
    return sums


def slower_than(path: Mapping[str, float], usual: Mapping[str, float]) -> list[tuple[str, float]]:
    """By how many seconds each label of a path is longer than in another one, the largest first."""
    names = {**path, **usual}
    differences = [(name, path.get(name, 0.0) - usual.get(name, 0.0)) for name in names]
    return sorted(differences, key=lambda one: -one[1])
