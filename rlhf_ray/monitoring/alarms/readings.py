"""What is known of the metrics of a run over time: states, which hold until the next one, and events, which are counted.

Invariants: nothing of after the moment that is asked for changes an answer about it. A state that is not known is None and
never 0; an event is counted once. The value of an age (``age/...``) grows with the time since it was read, unless it is 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

AGE = "age/"
"""Names of metrics that say how long something has lasted begin so."""

State = tuple[float, float | None]
"""When a state was read, in seconds since 1970, and its value: None from when on it is not known."""
Event = tuple[float, float]
"""When something was counted, and how much of it."""


@dataclass(frozen=True)
class Readings:
    """States and events by metric, each in the order of time."""

    states: Mapping[str, Sequence[State]] = field(default_factory=dict)
    events: Mapping[str, Sequence[Event]] = field(default_factory=dict)

    def value(self, name: str, at: float) -> float | None:
        """The state at a moment; None where it is not known."""
        states = self.states.get(name, ())
        index = bisect_right(states, at, key=_time) - 1
        if index < 0:
            return None
        when, value = states[index]
        return value + (at - when) if value and name.startswith(AGE) else value

    def seen(self, name: str, at: float) -> float:
        """When the state was last read, up to a moment; minus infinity where it never was."""
        states = self.states.get(name, ())
        index = bisect_right(states, at, key=_time) - 1
        return states[index][0] if index >= 0 else -math.inf

    def held(self, name: str, begin: float, end: float) -> Iterator[float]:
        """Every value that the state had between two moments, both included; nothing where it was not known at the first."""
        first = self.value(name, begin)
        if first is None:
            return
        yield first
        states = self.states[name]
        for _, value in states[bisect_right(states, begin, key=_time) : bisect_right(states, end, key=_time)]:
            if value is not None:
                yield value

    def counted(self, name: str, begin: float, end: float) -> float:
        """How much was counted after ``begin``, up to ``end``."""
        events = self.events.get(name, ())
        first, last = bisect_right(events, begin, key=_time), bisect_right(events, end, key=_time)
        return sum(value for _, value in events[first:last])

    def since(self, begin: float) -> Readings:
        """The same without what was replaced or counted before ``begin``."""
        states = {}
        for name, every in self.states.items():
            states[name] = every[max(bisect_left(every, begin, key=_time) - 1, 0) :]
        events = {name: every[bisect_left(every, begin, key=_time) :] for name, every in self.events.items()}
        return Readings(states, events)


def _time(reading: tuple[float, float | None]) -> float:
    return reading[0]
