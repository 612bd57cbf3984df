"""What of the record of a run a tracker is sent, and as which curve.

Invariants: every step is one row of a curve, and steps only rise. A row is sent once it is whole: once a later step is on
record, or no process works on the run. By default the curve is that of the run, which holds what is committed: what a resume
undoes was never sent. Live, each attempt is a curve of its own, with every step that it logged, in its first values.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RUN = "run"
"""The curve of committed steps."""
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """The values of one step: finite numbers by metric, with ``timestamp`` in seconds since 1970."""

    step: int
    timestamp: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """What the files of a run say: its lines and those that were undone, the start of each attempt, and its newest commit."""

    lines: Sequence[Line]
    void: Sequence[Line] = ()
    starts: Sequence[float] = ()
    committed: int = -1
    trained: int | None = None
    """The step whose weights are the result; none before the end."""
    finished: bool = False


@dataclass
class _Gathered:
    timestamp: float
    values: dict[str, float] = field(default_factory=dict)


def rows_of(lines: Iterable[Line]) -> list[Row]:
    """One row for each step, in order; of a value that a step has twice, the first."""
    steps: dict[int, _Gathered] = {}
    for line in lines:
        row = steps.setdefault(line["step"], _Gathered(float(line["timestamp"])))
        for name, value in line.items():
            if name not in ("step", "timestamp") and value is not None and math.isfinite(value):
                row.values.setdefault(name, float(value))
    return [Row(step, row.timestamp, row.values) for step, row in sorted(steps.items())]


def attempt_name(number: int) -> str:
    """The name of the curve of an attempt."""
    return f"attempt-{number}"


def sendable(record: Record, *, live: bool, over: bool) -> dict[str, list[Row]]:
    """The rows that may be sent, by curve; ``over`` says that no process works on the run any more."""
    return _by_attempt(record, over) if live else {RUN: _committed(record, over)}


def _committed(record: Record, over: bool) -> list[Row]:
    rows = rows_of(record.lines)
    if record.finished:
        return rows
    newest = rows[-1].step if rows else 0
    # The last evaluation of a run that has its result may still come: it has the step of the last row.
    whole = over and record.trained != newest
    return [row for row in rows if row.step <= record.committed and (row.step < newest or whole)]


def _by_attempt(record: Record, over: bool) -> dict[str, list[Row]]:
    lines: list[list[Line]] = [[] for _ in record.starts]
    for line in sorted([*record.lines, *record.void], key=lambda line: float(line["timestamp"])):
        attempt = bisect_right(record.starts, line["timestamp"])
        if attempt:
            lines[attempt - 1].append(line)
    curves = {attempt_name(number): rows_of(some) for number, some in enumerate(lines, 1)}
    if curves and not over:
        del curves[attempt_name(len(lines))][-1:]  # the row of the step that is being logged
    return curves
