"""How much of its time a process spends inside calls.

Invariant: a moment in which several calls are under way, in several threads or one inside the other, counts once.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any


class BusyTime:
    """Counts the seconds in which at least one call is under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self._seconds = 0.0
        self._looked_at = clock()
        self._looked = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """The ``with`` block is a call."""
        with self._lock:
            if not self._under_way:
                self._since = self._clock()
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self._seconds += self._clock() - self._since

    def share(self) -> float:
        """The share of the time since the last look at it, or since the start, that was inside calls: 0 to 1."""
        with self._lock:
            now = self._clock()
            seconds = self._seconds + (now - self._since if self._under_way else 0.0)
            passed, busy = now - self._looked_at, seconds - self._looked
            self._looked_at, self._looked = now, seconds
        return min(max(busy / passed, 0.0), 1.0) if passed > 0 else 0.0


def count_calls(actor: type, beside: Collection[str]) -> None:
    """Have the public methods of a class counted as calls by the ``busy`` of its instances, but for those named ``beside``."""
    for name, method in inspect.getmembers(actor, inspect.isfunction):
        if not name.startswith("_") and name not in beside:
            setattr(actor, name, _counted(method))


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        with self.busy.call():
            return method(self, *arguments, **named)

    return run
