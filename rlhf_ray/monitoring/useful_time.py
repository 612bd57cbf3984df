"""How much of the time of a run became committed steps, and where the rest went.

Invariants: the useful time and all losses add up to the time of the run, from its first start to its last sign of life, but for
the pauses in which it was stopped on request. Every moment counts once, for the most particular reason. All of it follows from
the files of the run.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

Line = Mapping[str, Any]
USEFUL = "useful"
REASONS = {
    "restarts": "restarting what failed, until the run went on",
    "stalls": "from the start of a step until it was noticed that it hung",
    "checkpoints": "writing checkpoints while training waited",
    "repeated steps": "steps, or parts of them, that were done again or undone",
    "uncommitted steps": "steps after the last commit",
    "start": "starting, from the start of an attempt to its first step",
    "down": "from the last sign of life of an attempt that failed to the start of the next",
    "other": "anything else, such as the last evaluation and the report",
}
"""Where time is lost, and what each means, as in docs/monitoring.md; the first that applies counts."""
_PAUSED = "paused"
_ORDER = (_PAUSED, "restarts", "stalls", "checkpoints", "repeated steps", USEFUL, "uncommitted steps", "start", "down")


@dataclass(frozen=True)
class Interruption:
    """What an incident says of time: noticed ``at`` (seconds since 1970), and ``seconds`` from then until the run went on."""

    at: float
    seconds: float
    hung: bool
    """Whether it was a hang, which is noticed long after it began."""
    repeats: bool
    """Whether the step that it came in was begun again, or ended."""
    undone: tuple[int, int] = (0, 0)
    """Steps after the first number, up to the second, whose updates were undone without being made again."""


@dataclass(frozen=True)
class UsefulTime:
    """Seconds: of the whole run without its pauses, of them useful, and lost by reason."""

    whole_s: float
    useful_s: float
    lost_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The useful share; 0 for a run that has just begun."""
        return self.useful_s / self.whole_s if self.whole_s else 0.0


@dataclass(frozen=True)
class _Span:
    begin: float
    end: float
    label: str


def useful_time(
    attempts: Sequence[Line],
    lines: Sequence[Line],
    void: Sequence[Line] = (),
    interruptions: Sequence[Interruption] = (),
    *,
    committed: int,
    now: float | None = None,
) -> UsefulTime:
    """The useful time of a run.

    ``attempts`` are the lines of ``attempts.jsonl``, ``lines`` those of ``metrics.jsonl`` and ``void`` those that were moved
    aside, ``committed`` is the newest committed step, and ``now`` the time if the run is under way.
    """
    if not attempts:
        return UsefulTime(0.0, 0.0)
    signs = [line["timestamp"] for line in (*lines, *void, *attempts)]
    signs += [line["stopped"] for line in attempts if "stopped" in line]
    signs += [one.at + one.seconds for one in interruptions]
    begin, end = attempts[0]["timestamp"], max(signs) if now is None else now
    steps = [*_steps(lines, interruptions, committed), *_steps(void, (), -1)]
    spans = [*steps, *_checkpoints(lines)]
    spans += _interrupted(interruptions, [*(span.end for span in steps), *(line["timestamp"] for line in attempts)])
    spans += _attempts(attempts, steps, signs)
    seconds = _sweep([span for span in spans if span.end > span.begin], begin, end)
    paused = seconds.pop(_PAUSED, 0.0)
    useful = seconds.pop(USEFUL, 0.0)
    lost = {reason: seconds[reason] for reason in REASONS if seconds.get(reason, 0.0) > 0.0}
    return UsefulTime(max(end - begin, 0.0) - paused, useful, lost)


def _steps(lines: Sequence[Line], interruptions: Sequence[Interruption], committed: int) -> Iterator[_Span]:
    """The time of each step; a negative ``committed`` says that all of them were done again."""
    undone = [(one.at, *one.undone) for one in interruptions if one.undone[0] < one.undone[1]]
    for line in lines:
        if line.get("time/step") is None:
            continue
        step, end = line["step"], line["timestamp"]
        begin = end - line["time/step"]
        label = USEFUL if step <= committed else "uncommitted steps"
        if committed < 0 or any(first < step <= last and begin <= at for at, first, last in undone):
            label = "repeated steps"
        yield _Span(begin, end, label)


def _checkpoints(lines: Sequence[Line]) -> Iterator[_Span]:
    for line in lines:
        if line.get("time/checkpoint"):
            yield _Span(line["timestamp"] - line["time/checkpoint"], line["timestamp"], "checkpoints")


def _interrupted(interruptions: Sequence[Interruption], ends: Sequence[float]) -> Iterator[_Span]:
    """What each interruption took: from noticing it, and from the start of the step that it came in."""
    ordered = sorted(ends)
    for one in interruptions:
        yield _Span(one.at, one.at + one.seconds, "restarts")
        before = bisect_right(ordered, one.at)
        if one.repeats and before:
            yield _Span(ordered[before - 1], one.at, "stalls" if one.hung else "repeated steps")


def _attempts(attempts: Sequence[Line], steps: Sequence[_Span], signs: Sequence[float]) -> Iterator[_Span]:
    """Of each attempt the time before its first step, and from its end to the next attempt."""
    begins, ordered = sorted(span.begin for span in steps), sorted(signs)
    for line, following in zip_longest(attempts, attempts[1:]):
        began = line["timestamp"]
        limit = math.inf if following is None else following["timestamp"]
        first = bisect_left(begins, began)
        last = ordered[bisect_left(ordered, limit) - 1]
        yield _Span(began, min(begins[first] if first < len(begins) else last, last, limit), "start")
        if following is None:
            continue
        if "stopped" in line:
            yield _Span(line["stopped"], limit, _PAUSED)
        else:
            yield _Span(last, limit, "down")


def _sweep(spans: Sequence[_Span], begin: float, end: float) -> dict[str, float]:
    """Seconds between ``begin`` and ``end`` by label: of the spans over a moment, the first label in the order counts."""
    changes = [(span.begin, span.label, 1) for span in spans] + [(span.end, span.label, -1) for span in spans]
    seconds: dict[str, float] = defaultdict(float)
    open_spans: Counter[str] = Counter()
    moment = begin
    for at, label, change in sorted(changes):
        until = min(max(at, begin), end)
        if until > moment:
            covering = next((name for name in _ORDER if open_spans[name]), "other")
            seconds[covering] += until - moment
            moment = until
        open_spans[label] += change
    seconds["other"] += max(end - moment, 0.0)
    return seconds
