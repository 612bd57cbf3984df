"""What a lane did at every moment of an interval: its own work, or what it waited for.

Invariants: the pieces of a lane follow one another without a gap or an overlap from the begin of the interval to its end. A
rank works while it answers a call, apart from those that it answers beside others; in all other time it waits, and the name of
the piece says for whom.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from rlhf_ray.monitoring.spans.records import DRIVER, Attempt, Life, Span

WORK, WAIT, STARTING, AWAY = "work", "wait", "starting", "away"
OUTSIDE = "outside of phases"
ON_ITS_WAY = "a call on its way"


@dataclass(frozen=True)
class Piece:
    """A part of a lane in which it did one thing, or waited for one."""

    begin: int
    end: int
    kind: str
    """``work``, ``wait``, ``starting`` (the process starts), or ``away`` (there is none)."""
    name: str
    calls: Mapping[str, str] = field(default_factory=dict)
    """Of the driver: the calls that it waited for."""

    @property
    def length(self) -> int:
        """Microseconds."""
        return self.end - self.begin


def driver_pieces(spans: Iterable[Span], begin: int, end: int) -> list[Piece]:
    """What the driver's main thread did: work in its innermost phase, or a wait for calls or for what its name says."""
    own = [span for span in spans if not span.thread and span.begin < end and span.end > begin]
    phases = [span for span in own if span.lane == DRIVER and span.kind in ("phase", "run")]
    waits = [span for span in own if span.inline or (span.lane == DRIVER and span.kind == "wait")]
    cuts = sorted(
        {begin, end, *(time for one in (*phases, *waits) for time in (one.begin, one.end) if begin < time < end)}
    )
    in_phase, in_wait = _innermost(phases, cuts), _innermost(waits, cuts)
    pieces = []
    for (left, right), phase, wait in zip(pairwise(cuts), in_phase, in_wait, strict=True):
        where = phase.name if phase is not None and phase.kind == "phase" else OUTSIDE
        if wait is None:
            pieces.append(Piece(left, right, WORK, where))
        else:
            calls = {wait.call: f"{wait.role}.{wait.name}"} if wait.inline else wait.calls
            pieces.append(Piece(left, right, WAIT, ", ".join(sorted(set(calls.values()))) or wait.name, calls))
    return joined(pieces)


def lane_pieces(lives: Sequence[Life], driver: Sequence[Piece], begin: int, end: int) -> list[Piece]:
    """What a lane of ranks did, process by process; ``driver`` are the driver's pieces of the same interval."""
    pieces: list[Piece] = []
    for number, life in enumerate(lives):
        until = lives[number + 1].born if number + 1 < len(lives) else end
        first = begin if number == 0 else life.born
        if min(until, end) > max(first, begin):
            pieces += _of_life(life, driver, max(first, begin), min(until, end))
    return joined(pieces)


def busy(spans: Iterable[Span], begin: int, end: int) -> list[tuple[int, int, str]]:
    """The parts of the interval in which a rank answered calls, and which; of calls side by side the one that began first."""
    parts, at = [], begin
    for span in sorted((span for span in spans if span.kind == "call"), key=lambda span: span.begin):
        left, right = max(span.begin, at), min(span.end, end)
        if right > left:
            parts.append((left, right, span.name))
            at = right
    return parts


def idle_shares(attempt: Attempt, begin: int, end: int) -> dict[str, float]:
    """For each role the share of the interval in which its ranks answered no call, over those that lived."""
    lived, worked = dict[str, int](), dict[str, int]()
    for life, until in _lifetimes(attempt, end):
        left, role = max(life.born, begin), life.lane.partition("/")[0]
        if until > left:
            lived[role] = lived.get(role, 0) + until - left
            work = sum(right - at for at, right, _ in busy(life.spans, left, until))
            worked[role] = worked.get(role, 0) + work
    return {role: 1.0 - worked[role] / lived[role] for role in lived}


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, with neighbours that are alike in one."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last is not None and (last.end, last.kind, last.name, last.calls) == (
            piece.begin,
            piece.kind,
            piece.name,
            piece.calls,
        ):
            result[-1] = replace(last, end=piece.end)
        else:
            result.append(piece)
    return result


def _lifetimes(attempt: Attempt, end: int) -> Iterable[tuple[Life, int]]:
    for lives in attempt.lanes().values():
        for number, life in enumerate(lives):
            yield life, min(lives[number + 1].born if number + 1 < len(lives) else end, end)


def _innermost(spans: Sequence[Span], cuts: Sequence[int]) -> list[Span | None]:
    """For each interval between cuts the span that began last of those that cover it; they nest."""
    waiting = sorted(spans, key=lambda span: (span.begin, -span.end))
    stack: list[Span] = []
    found: list[Span | None] = []
    at = 0
    for left, _ in pairwise(cuts):
        while at < len(waiting) and waiting[at].begin <= left:
            stack.append(waiting[at])
            at += 1
        stack = [span for span in stack if span.end > left]
        found.append(stack[-1] if stack else None)
    return found


def _of_life(life: Life, driver: Sequence[Piece], begin: int, end: int) -> list[Piece]:
    pieces: list[Piece] = []
    at = begin
    if life.born > begin:
        pieces.append(Piece(begin, min(life.born, end), AWAY, "no process"))
        at = min(life.born, end)
    if life.started > at and not life.in_driver:
        pieces.append(Piece(at, min(life.started, end), STARTING, "the process starts"))
        at = min(life.started, end)
    ended = {span.call: span.end for span in life.spans if span.kind == "call"}
    for left, right, name in [*busy(life.spans, at, end), (end, end, "")]:
        pieces += _idle(life, driver, ended, at, left)
        if right > left:
            pieces.append(Piece(left, right, WORK, name))
        at = right
    return pieces


def _idle(life: Life, driver: Sequence[Piece], ended: Mapping[str, int], begin: int, end: int) -> list[Piece]:
    """The time in which a rank has nothing to do, by what the driver does meanwhile."""
    pieces = []
    first = max(bisect_right(driver, begin, key=lambda piece: piece.begin) - 1, 0)
    for piece in driver[first:]:
        left, right = max(piece.begin, begin), min(piece.end, end)
        if left >= end:
            break
        if right > left:
            pieces.append(Piece(left, right, WAIT, _reason(piece, ended, left)))
    return pieces


def _reason(piece: Piece, ended: Mapping[str, int], at: int) -> str:
    if piece.kind == WORK:
        return f"{DRIVER}: {piece.name}"
    others = {name for call, name in piece.calls.items() if call not in ended}
    if others:
        return ", ".join(sorted(others))
    peers = {name for call, name in piece.calls.items() if ended.get(call, at + 1) <= at}
    if peers:
        return f"other ranks: {', '.join(sorted(peers))}"
    return ON_ITS_WAY if piece.calls else piece.name
