"""The readings of a run from its records, for its alarms: the lines of metrics and the last heartbeat.

Invariants: a line that a resume moved aside still counts for what happened, and no longer for how the run is. A number that was
not finite is not known from then on, and nothing is known of a new attempt before its first line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlhf_ray.monitoring.alarms.readings import Event, Readings, State
from rlhf_ray.monitoring.registry import REGISTRY, Kind


def of_lines(
    lines: Iterable[Mapping[str, Any]], void: Iterable[Mapping[str, Any]] = (), starts: Sequence[float] = ()
) -> Readings:
    """What the lines of ``metrics.jsonl`` tell the alarms of the registry; ``void`` are those that a resume moved aside.

    ``starts`` are the times at which attempts began, in seconds since 1970. Metrics that no alarm reads are left out: a run has
    many lines, and each picture of ``status --follow`` asks for them.
    """
    names = read_by_alarms()
    states: dict[str, list[State]] = defaultdict(list)
    events: dict[str, list[Event]] = defaultdict(list)
    for line in lines:
        add_line(_only(names, line), line["timestamp"], states, events)
    for line in void:
        add_line(_only(names, line), line["timestamp"], {}, events)
    for every in events.values():
        every.sort()
    for name, known in states.items():
        states[name] = sorted([*known, *((start, None) for start in starts)], key=lambda one: one[0])
    return Readings(states, events)


@lru_cache(maxsize=1)
def read_by_alarms() -> tuple[str, ...]:
    """The metrics that the alarms of the registry read."""
    return tuple(dict.fromkeys(name for alarm in REGISTRY.alarms for name in alarm.metrics))


def _only(names: Iterable[str], line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in names if name in line}


def add_line(
    line: Mapping[str, Any], at: float, states: dict[str, list[State]], events: dict[str, list[Event]]
) -> None:
    """Add the values of a line; what is no metric of the registry is left out."""
    for name, value in line.items():
        kind = _kind(name)
        if kind == "counter":
            if value:
                events.setdefault(name, []).append((at, float(value)))
        elif kind is not None:
            states.setdefault(name, []).append((at, None if value is None else float(value)))


@lru_cache(maxsize=4096)
def _kind(name: str) -> Kind | None:
    """Whether a metric is a gauge or a counter; None for what is no metric. Asked for every value of a run."""
    return REGISTRY[name].kind if name in REGISTRY else None


def with_heartbeat(
    readings: Readings, at: float, values: Mapping[str, float], events: Mapping[str, Iterable[Event]]
) -> Readings:
    """The same with what the driver read of itself ``at`` a moment, and counted up to it."""
    states = {**readings.states, **{name: [(at, value)] for name, value in values.items()}}
    return Readings(states, {**readings.events, **{name: sorted(counted) for name, counted in events.items()}})
