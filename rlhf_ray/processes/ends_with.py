"""A process that ends with another one, whatever it is doing: also inside somebody's code that never returns.

Invariants: a second process sees to it, since a thread would wait for code that does not let go of the interpreter; it ends by
itself as soon as the process does that it looks after, and holds nothing that anybody waits for, neither pipes nor output.

This module needs the standard library alone: ``environments/verifiers_server.py`` loads it in a Python that lacks this package.
"""

from __future__ import annotations

import os
import select
import signal

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_with(descriptor: int, grace_s: float = 0.0) -> None:
    """Have this process killed ``grace_s`` after ``descriptor`` says that it is over.

    That is a pipe or socket whose other side is closed, or the end of a process (``os.pidfd_open``). Call it before this
    process starts threads.
    """
    served = os.pidfd_open(os.getpid())
    if os.fork():
        os.close(served)
        return
    try:
        _look_after(served, descriptor, grace_s)
    finally:
        os._exit(0)


def _look_after(served: int, descriptor: int, grace_s: float) -> None:
    for number in INTERRUPTS:  # which a terminal sends to all; the process decides what becomes of it
        signal.signal(number, signal.SIG_IGN)
    _hold_only(served, descriptor)
    ends = select.poll()
    ends.register(served, select.POLLIN)
    is_pidfd = os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[pidfd]"
    ends.register(descriptor, select.POLLIN if is_pidfd else 0)  # of a pipe nothing but that the other side is closed
    if any(ended == served for ended, _ in ends.poll()):
        return
    ends.unregister(descriptor)
    if not ends.poll(1000 * grace_s):
        signal.pidfd_send_signal(served, signal.SIGKILL)


def _hold_only(*kept: int) -> None:
    """Close every other file: whoever reads what the process writes must see its end."""
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            try:
                os.close(number)
            except OSError:  # the one that listed them
                continue
