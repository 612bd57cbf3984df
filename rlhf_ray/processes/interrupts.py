"""SIGINT, SIGTERM and SIGHUP as one exception, for work that loses nothing when it is broken off.

Invariants: the first of these signals raises :class:`Interrupted` in the main thread, and later ones are ignored, so that
cleaning up is not broken off in its turn; a SIGHUP that was ignored when the process started (``nohup``) stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlhf_ray.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a process to stop."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the signals raise :class:`Interrupted` in the block, and restore what they did before after it."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise Interrupted(number)

    try:
        with handled_by(interrupt):
            yield
    except Interrupted:
        raise
    except KeyboardInterrupt:  # Ray makes a plain one of what is raised while it waits
        raise Interrupted(received[0] if received else signal.SIGINT) from None


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let ``handler`` have the signals in the block; in another thread than the main one they stay as they are."""
    with kept_handlers():
        listen(handler)
        yield


@contextmanager
def kept_handlers(exits_on: signal.Signals | None = None) -> Iterator[None]:
    """After the block the signals do what they did before it, whatever a library made them do.

    If the library exits on ``exits_on`` meanwhile, with its number, that signal is handled as before the block.
    """
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    except SystemExit as ended:
        _restore(previous)
        if exits_on is not None and ended.code == exits_on:
            signal.raise_signal(exits_on)
        raise
    finally:
        _restore(previous)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # else it was not set from Python, and cannot be set again
                signal.signal(number, handler)


def listen(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Let ``handler`` have the signals from now on."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
