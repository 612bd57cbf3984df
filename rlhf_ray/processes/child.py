"""Run a process that does the work, in a session of its own, and wait for it.

Invariants: a signal to this process, or to its whole group, reaches the child alone and not what the child started; it is
acknowledged at once, and none is lost while the child starts. The child's outcome is its exit code, or what it said before
it left its cluster, if leaving did not end well. After its end nothing of its session is left.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

from rlhf_ray import environment
from rlhf_ray.console import get_logger
from rlhf_ray.processes import lifeline
from rlhf_ray.processes.interrupts import SIGNALS, handled_by

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_LEAVE = 20.0
"""How long a child may take to leave its cluster; Ray itself would wait for a dead one for 60 s."""
SECONDS_TO_END = 3.0


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative for a signal), and the first signal that asked it to stop, if one did."""

    code: int
    signal: int | None = None

    @property
    def how(self) -> str:
        """Such as ``ended with 1`` or ``was killed by SIGKILL``."""
        if self.code >= 0:
            return f"ended with {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:  # a real-time signal has no name
            name = f"signal {-self.code}"
        hint = ", as by the kernel when memory runs out" if -self.code == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"


def run_child(arguments: Sequence[str], *, text: str | None = None, on_stop: str) -> Ended:
    """Run Python with ``arguments`` to its end; ``text`` is its standard input, by default that of this process.

    ``on_stop`` says what the child does when it is asked to stop.
    """
    received: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            get_logger().info("%s: %s", signal.Signals(number).name, on_stop)
        for child in running:
            child.send_signal(number)

    ours, theirs = socket.socketpair()
    with ours, handled_by(pass_on):
        with theirs:
            child = _start(arguments, theirs, text is not None)
        running.append(child)
        if received:  # before the child existed
            child.send_signal(received[-1])
        if text is not None:
            _write(child, text.encode())
        code = _wait(child, ours)
        _end_session(child.pid)
    return Ended(code, received[0] if received else None)


def _start(arguments: Sequence[str], line: socket.socket, has_text: bool) -> subprocess.Popen[bytes]:
    variables = {**environment.for_process(), **os.environ, lifeline.DESCRIPTOR: str(line.fileno())}
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the child inherits it, until it handles them
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE if has_text else None,
            env=variables,
            pass_fds=(line.fileno(),),
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def _write(child: subprocess.Popen[bytes], text: bytes) -> None:
    assert child.stdin is not None, "it was asked for"
    with suppress(BrokenPipeError), child.stdin as stdin:  # it may end before it has read all
        stdin.write(text)


def _wait(child: subprocess.Popen[bytes], line: socket.socket) -> int:
    """The exit code of the child, or the one that it said before it began to leave its cluster and did not get away."""
    said, deadline = None, 0.0
    lines = [line]
    while child.poll() is None:
        readable, _, _ = select.select(lines, [], [], SECONDS_BETWEEN_LOOKS)
        if readable:
            words = line.recv(64)
            if not words:
                lines = []
                continue
            said = None if words[-1:] == lifeline.LEFT else words[-1]
            deadline = time.monotonic() + SECONDS_TO_LEAVE
        elif not lines:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if said is not None and time.monotonic() > deadline:
            child.kill()
            child.wait()
    words = line.recv(64) if lines and select.select(lines, [], [], 0)[0] else b""
    if words:
        said = None if words[-1:] == lifeline.LEFT else words[-1]
    if said is None:
        return child.returncode
    get_logger().warning(
        "the work had ended with %d, but its cluster could not be left in order, as when it has died", said
    )
    return said


def _end_session(session: int) -> None:
    """End what is left of a child's session: with a dead cluster these are agents of Ray, which look for it for a while."""
    left = _processes_of(session)
    for process in left:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=SECONDS_TO_END)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=SECONDS_TO_END)


def _processes_of(session: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getsid(pid) == session:
                found.append(psutil.Process(pid))
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)
