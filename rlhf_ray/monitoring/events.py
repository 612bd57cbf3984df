"""What happens to a run between two of its steps: events, which are counted, and calls that are under way.

Invariants: an event is counted the moment it happens, so that it is seen also where it is mended before anybody looks. Any
thread may count. What is kept does not grow with the run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count as count_from

from rlhf_ray.monitoring.stalls import Durations

KEPT = 1000

_lock = threading.Lock()
_numbers = count_from(1)
_events: deque[tuple[int, float, str, float]] = deque(maxlen=KEPT)
_under_way: dict[object, tuple[str, float]] = {}
_durations = Durations()


def count(name: str, by: float = 1.0) -> None:
    """Count something now; ``name`` is a counter of the registry."""
    with _lock:
        _events.append((next(_numbers), time.time(), name, by))


def counted_after(number: int) -> list[tuple[int, float, str, float]]:
    """What was counted after the event of a number: its number, when (seconds since 1970), what and how much."""
    with _lock:
        return [event for event in _events if event[0] > number]


def newest() -> int:
    """The number of the last event; 0 before the first."""
    with _lock:
        return _events[-1][0] if _events else 0


@contextmanager
def call(kind: str) -> Iterator[None]:
    """Around a call; how long one takes that succeeds counts for the median of its kind."""
    mark, began = object(), time.monotonic()
    with _lock:
        _under_way[mark] = (kind, began)
    try:
        yield
        with _lock:
            _durations.add(kind, time.monotonic() - began)
    finally:
        with _lock:
            del _under_way[mark]


def oldest_call(kind: str) -> float:
    """For how long the oldest call of a kind has been under way, in seconds; 0 where there is none."""
    now = time.monotonic()
    with _lock:
        return max((now - began for one, began in _under_way.values() if one == kind), default=0.0)


def usual_call(kind: str) -> float | None:
    """The median of the calls of a kind, in seconds; None before the first has succeeded."""
    with _lock:
        return _durations.median(kind)
