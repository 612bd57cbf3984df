"""Stopping between steps: a signal asks, the loop answers after a commit.

Always true: the handler only sets a flag; nothing is interrupted in the middle.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_asked = threading.Event()


def listen() -> None:
    """Turn SIGTERM and SIGINT into a request to stop after the current step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    _asked.set()


def stop_requested() -> bool:
    """Whether somebody asked this process to stop."""
    return _asked.is_set()
