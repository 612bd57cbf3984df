"""Run a process that does the work, in a session of its own, and wait for it.

Invariants: a signal to this process, or to its whole group, reaches the child alone and not what the child started; it is
acknowledged at once, and none is lost while the child starts. The child's outcome is its exit code, or what it said before
it left its cluster, if leaving did not end well. One that gives no sign of life for too long, because it is stopped or hangs,
is killed. After its end nothing of its session is left.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

from rlhf_ray import environment
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE
from rlhf_ray.processes import lifeline, stacks
from rlhf_ray.processes.interrupts import SIGNALS, handled_by

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_LEAVE = 20.0
"""How long a child may take to leave its cluster; Ray itself would wait for a dead one for 60 s."""
SECONDS_TO_END = 3.0
SECONDS_TO_BEGIN = 300.0
"""How long a child may take to import what it needs to say anything."""
SILENT_S = 90.0
"""How long a child may give no sign of life."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative for a signal), and the first signal that asked it to stop, if one did."""

    code: int
    signal: int | None = None
    silence: str = ""
    """What is known of one that gave no sign of life and was killed for that."""

    @property
    def how(self) -> str:
        """Such as ``ended with 1`` or ``was killed by SIGKILL``."""
        if self.silence:
            return self.silence
        if self.code >= 0:
            return f"ended with {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:  # a real-time signal has no name
            name = f"signal {-self.code}"
        hint = ", as by the kernel when memory runs out" if -self.code == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"


def run_child(
    arguments: Sequence[str],
    *,
    text: str | None = None,
    on_stop: str,
    silent_s: float = SILENT_S,
    keep_stacks: Callable[[Sequence[int]], str] = lambda pids: "",
) -> Ended:
    """Run Python with ``arguments`` to its end; ``text`` is its standard input, by default that of this process.

    ``on_stop`` says what the child does when it is asked to stop. One that gives no sign of life for ``silent_s`` seconds is
    killed, after ``keep_stacks`` has kept what the processes with these ids do, and said where.
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

        def on_silent(pid: int) -> str:
            where = stacks.kept(lambda: keep_stacks(stacks.tree(pid)))
            how = f"gave no sign of life for {silent_s:g} s (it was stopped, or hung), and was killed"
            get_logger().error("the process that does the work %s%s", how, where and f"; stacks: {where}")
            return how

        code, silence = _wait(child, ours, Heard(silent_s), on_silent)
        _end_session(child.pid)
    return Ended(code, received[0] if received else None, silence)


def _start(arguments: Sequence[str], line: socket.socket, has_text: bool) -> subprocess.Popen[bytes]:
    variables = environment.for_process() | environment.RAY_WHEN_ASKED | os.environ
    variables[lifeline.DESCRIPTOR] = str(line.fileno())
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


class Heard:
    """What a child has said, and for how long it has been silent; pure.

    Time in which the parent itself was kept from listening does not count as silence.
    """

    def __init__(self, silent_s: float) -> None:
        self._silent_s = silent_s
        self._quiet_s = 0.0
        self._beats = False
        self.outcome: int | None = None
        """The exit code of a child that has begun to leave its cluster, and has not got away yet."""
        self._has_result = False
        """Whether the result is there, and nothing was said of the outcome since."""

    def hear(self, words: bytes) -> None:
        """Take what was said."""
        for word in words:
            if word == lifeline.BEAT[0]:
                self._beats = True
            elif word == lifeline.RESULT[0]:
                self._has_result = True
            else:
                self.outcome = None if word == lifeline.LEFT[0] else word
                self._has_result = False
        self._quiet_s = 0.0

    def wait(self, seconds: float) -> None:
        """Nothing was said for so long, as far as this process knows, which looks every ``SECONDS_BETWEEN_LOOKS``."""
        self._quiet_s += min(seconds, 2 * SECONDS_BETWEEN_LOOKS)

    def ended(self, code: int) -> int:
        """The outcome of a child that has ended with ``code``, or by a signal where that is negative.

        A cluster that dies ends the child with a code of its own, and without a word. That of a child with a result is none.
        """
        if self.outcome is not None:
            return self.outcome
        return EXIT_DONE if self._has_result and code > 0 else code

    @property
    def is_silent(self) -> bool:
        """Whether the child has said nothing for too long; before the first word it has longer, to begin."""
        return self._quiet_s >= (self._silent_s if self._beats else max(self._silent_s, SECONDS_TO_BEGIN))


def _wait(
    child: subprocess.Popen[bytes], line: socket.socket, heard: Heard, on_silent: Callable[[int], str]
) -> tuple[int, str]:
    """The exit code of the child, or the one that it said before it began to leave its cluster and did not get away.

    With it comes what ``on_silent`` says of a child that fell silent and was killed, or nothing.
    """
    lines, leaves_by, looked = [line], float("inf"), time.monotonic()
    silence = ""
    while child.poll() is None:
        readable, _, _ = select.select(lines, [], [], SECONDS_BETWEEN_LOOKS)
        now = time.monotonic()
        heard.wait(now - looked)
        looked = now
        if readable:
            words = line.recv(4096)
            lines = lines if words else []
            before = heard.outcome
            heard.hear(words)
            if heard.outcome != before:
                leaves_by = now + SECONDS_TO_LEAVE if heard.outcome is not None else float("inf")
        elif not lines:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if silence:
            continue  # it was killed, and ends once the kernel can end it, such as when a file system answers again
        if lines and heard.is_silent and heard.outcome is None:
            silence = on_silent(child.pid)
            _kill(child)
        elif now > leaves_by:
            _kill(child)
    while lines and select.select(lines, [], [], 0)[0] and (words := line.recv(4096)):
        heard.hear(words)
    outcome = heard.ended(child.returncode)
    if outcome == child.returncode and heard.outcome is None:
        return outcome, silence
    get_logger().warning(
        "the work had ended with %d, but its cluster could not be left in order, as when it has died", outcome
    )
    return outcome, ""


def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with suppress(subprocess.TimeoutExpired):  # the kernel ends it once it can be interrupted
        child.wait(SECONDS_TO_END)


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
