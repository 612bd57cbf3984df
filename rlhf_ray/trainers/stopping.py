"""Stop a training run between two steps when it gets SIGTERM or SIGINT.

Invariant: the signal handler only sets a flag, which the training loop reads after each step; nothing is interrupted in the
middle.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_stop = threading.Event()


def listen() -> None:
    """Turn SIGTERM and SIGINT into a request to stop after the current step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _request_stop)


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _stop.is_set()


def _request_stop(number: int, frame: FrameType | None) -> None:
    _stop.set()
