"""The record of the alarms of a run: when each began and ended.

Invariants: lines are only added. What began and has no end in the record ended with the attempt, or holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_ray.monitoring.alarms.alarm import SEVERITIES
from rlhf_ray.runs.lines import count_problem, not_a, number_problem
from rlhf_ray.storage.jsonl import JsonLines


@dataclass(frozen=True)
class AlarmChange:
    """An alarm has begun, or has ended."""

    at: float
    step: int
    alarm: str
    severity: str
    began: bool
    reading: str
    """What was read then, in a phrase."""


class AlarmRecord:
    """The file ``alarms.jsonl`` of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines = JsonLines(self.path, alarm_problem)

    def add(self, change: AlarmChange) -> None:
        """Add one; raises :class:`StorageError` where it cannot be written."""
        self._lines.append(asdict(change))

    def read(self) -> list[AlarmChange]:
        """All of them, in order."""
        return [
            AlarmChange(**{name: line[name] for name in AlarmChange.__dataclass_fields__})
            for line in self._lines.read()
        ]


def alarm_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line; empty if nothing is."""
    for name in ("alarm", "reading"):
        if not isinstance(line.get(name), str):
            return not_a(line, name, "a text")
    if line.get("severity") not in SEVERITIES:
        return not_a(line, "severity", f"one of {', '.join(SEVERITIES)}")
    if not isinstance(line.get("began"), bool):
        return not_a(line, "began", "true or false")
    return count_problem(line, "step") or number_problem(line, "at")


@dataclass(frozen=True)
class Past:
    """An alarm that held for a time."""

    alarm: str
    severity: str
    began: float
    """In seconds since 1970."""
    ended: float | None
    """None where it holds still."""
    step: int
    """The last finished step when it began."""
    reading: str


def history(changes: Sequence[AlarmChange], starts: Sequence[float], last_sign: float | None) -> list[Past]:
    """When alarms held, in the order in which they began.

    ``starts`` are the times at which attempts began: none holds over the end of one. ``last_sign`` is when a run that is not
    under way last gave a sign of life, None for one that is.
    """
    past: list[Past] = []
    held: dict[str, int] = {}

    def end(name: str, at: float) -> None:
        number = held.pop(name)
        past[number] = replace(past[number], ended=at)

    marks = sorted([*((one.at, 1, one) for one in changes), *((at, 0, None) for at in starts)], key=lambda one: one[:2])
    for at, _, change in marks:
        if change is None:
            for name in [*held]:
                end(name, at)
        elif change.began and change.alarm not in held:
            held[change.alarm] = len(past)
            past.append(Past(change.alarm, change.severity, at, None, change.step, change.reading))
        elif not change.began and change.alarm in held:
            end(change.alarm, at)
    if last_sign is not None:
        for name in [*held]:
            end(name, max(last_sign, past[held[name]].began))
    return past
