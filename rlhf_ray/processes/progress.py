"""When this process last got ahead with something that it waits for: the answer of a rank, of a function, of a service.

Invariants: only what came from outside counts, so that a thread that runs in a circle shows no progress. A wait with a deadline
of its own counts as progress until that deadline: it ends by itself. What a thread does that only watches counts for nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_made_at = time.monotonic()
_deadlines: dict[object, float] = {}
_lock = threading.Lock()
_this_thread = threading.local()


def made() -> None:
    """Note that something came."""
    global _made_at
    if not getattr(_this_thread, "watches", False):
        _made_at = time.monotonic()


def only_watches() -> None:
    """Count for nothing what this thread does from now on: it goes on while the work of the process hangs."""
    _this_thread.watches = True


@contextmanager
def waiting(limit_s: float) -> Iterator[None]:
    """Around a wait, by any thread, which ends by itself after so many seconds."""
    wait = object()
    with _lock:
        _deadlines[wait] = time.monotonic() + limit_s
    try:
        yield
    finally:
        with _lock:
            del _deadlines[wait]
        made()


def made_at() -> float:
    """When something last came, in seconds of ``time.monotonic``: now, while a wait goes on that has time left."""
    now = time.monotonic()
    with _lock:
        return max([_made_at, *(min(now, deadline) for deadline in _deadlines.values())])
