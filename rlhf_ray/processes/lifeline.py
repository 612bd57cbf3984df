"""The child's end of the line between a process that does the work and the one that started it and waits for it.

Invariants: a child whose parent ends, however it ends, is asked to stop as by SIGTERM. What a child says about its outcome
before it leaves a cluster holds, and its error is told by then, even if leaving kills it or never ends: Ray ends a process
whose cluster has died. While any Python runs in the child, it says so every ``BEAT_EVERY_S``: one that is stopped, or hangs in
code that does not let go of the interpreter, falls silent. Saying something waits for nobody, also where the parent is stopped.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, RlhfRayError
from rlhf_ray.processes.interrupts import SIGNALS

DESCRIPTOR = "RLHF_RAY_LIFELINE"
"""The environment variable that gives a child the number of its end of the line."""
LEFT = b"\xff"
"""What is said once the cluster is left."""
BEAT = b"\xfe"
"""What is said again and again."""
RESULT = b"\xfd"
"""What is said once the result of the work is committed; every other byte is an exit code."""
BEAT_EVERY_S = 2.0

_line: socket.socket | None = None


def is_child() -> bool:
    """Whether a parent of ours waits for this process."""
    return _line is not None or DESCRIPTOR in os.environ


def connect() -> None:
    """Take up the line, if a parent of ours gave one, and the signals that it held back until now, when they are handled."""
    global _line
    number = os.environ.pop(DESCRIPTOR, None)  # a process that this one starts is no child of that parent
    if number is None:
        return
    line = _line = socket.socket(fileno=int(number))
    line.set_inheritable(False)
    _say(BEAT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_watch, args=(line,), name="lifeline", daemon=True).start()
    threading.Thread(target=_beat, args=(line,), name="heartbeat", daemon=True).start()


@contextmanager
def leaving(error: BaseException | None) -> Iterator[None]:
    """Around the leaving of a cluster by work that ended in ``error``, or was done."""
    if _line is not None and isinstance(error, RlhfRayError):
        from rlhf_ray.console import get_logger

        get_logger().error("%s", error)  # now, since leaving may kill this process
        error.is_told = True
    _say(bytes([outcome(error)]))
    try:
        yield
    finally:
        _say(LEFT)


def fails() -> None:
    """Say that this process is about to end as a failure, which no result excuses."""
    _say(bytes([EXIT_FAILED]) + LEFT)


def result_is_there() -> None:
    """Say that the work has its result: if its cluster now ends this process, without a word of it, the work is done."""
    _say(RESULT)


def outcome(error: BaseException | None) -> int:
    """The exit code of work that ended in ``error``."""
    if error is None:
        return EXIT_DONE
    code = (
        getattr(error, "exit_code", EXIT_FAILED) if isinstance(error, RlhfRayError | KeyboardInterrupt) else EXIT_FAILED
    )
    return int(code)


def _say(word: bytes) -> None:
    if _line is not None:
        with suppress(OSError):  # the parent is gone
            _line.send(word)


def _beat(line: socket.socket) -> None:
    room = select.poll()
    room.register(line, select.POLLOUT)
    while True:
        # Of a parent that is stopped, and reads nothing, the line fills up. Linux calls a socket writable while three quarters
        # of its buffer are free, which leaves room for what has to be said without waiting.
        if room.poll(0):
            try:
                line.send(BEAT, socket.MSG_DONTWAIT)
            except OSError:
                return
        time.sleep(BEAT_EVERY_S)


def _watch(line: socket.socket) -> None:
    with suppress(OSError):
        while line.recv(1):
            pass
    from rlhf_ray.console import get_logger  # imports much, and a command asks of this module before it needs that

    get_logger().warning("the process that started this one has ended: stopping as by SIGTERM")
    os.kill(os.getpid(), signal.SIGTERM)
