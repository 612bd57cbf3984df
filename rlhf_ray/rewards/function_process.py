"""Runs a user's reward function in a process of its own, which can be ended when it hangs and may die without harm.

    python -m rlhf_ray.rewards.function_process NAME FD PARENT

Invariants: a run of calls ends in one outcome per call, within the time limit of each; a call that hangs, or takes its
process with it, costs only itself, since the calls after it run in a new process; what the function prints reaches standard
error; the process ends with the one that started it, also inside a call that never returns.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.processes import progress, stacks
from rlhf_ray.processes.ends_with import end_with
from rlhf_ray.rewards.functions import (
    Columns,
    Failure,
    Outcome,
    accepted_columns,
    call_size,
    is_async,
    load_function,
    run_calls,
    too_late,
)

START_LIMIT_S = 120.0
"""How long importing the function's module may take."""
END_LIMIT_S = 10.0
"""How long a process that was killed, or has closed its pipe, may take to end."""
GRACE_S = 5.0
"""How much later than its own limit an asynchronous call may end before its process is ended."""


class FunctionProcess:
    """A function by its name, in a process that is started at once and again whenever it was ended, until :meth:`close`."""

    module = __name__
    """What runs in the process: its arguments are :attr:`arguments`, and the numbers of a pipe and a ``pidfd`` of this one."""
    key = "reward.function"
    """The config key that names the function."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self._slowest_s: float | None = None
        """Seconds of the slowest call that has ended, of those that run one after the other."""
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.columns, self.is_async = self._start()

    @property
    def arguments(self) -> list[str]:
        """What the process is told to load."""
        return [self.name]

    def too_late(self, samples: int) -> Failure:
        """How a call for so many samples ends that did not answer in time."""
        return too_late(self.timeout_s, samples, self._slowest_s)

    def run(self, calls: Sequence[Columns]) -> list[Outcome]:
        """The outcome of every call, in order; raises :class:`ScoringError` once it is closed."""
        ended: dict[int, Outcome] = {}
        while len(ended) < len(calls):
            left = [number for number in range(len(calls)) if number not in ended]
            ended |= self._run([calls[number] for number in left], left)
        return [ended[number] for number in range(len(calls))]

    def close(self) -> None:
        """End the process; a call that is running fails, and none starts it again."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            # The kernel ends it once it can be interrupted.
            with suppress(subprocess.TimeoutExpired), progress.waiting(END_LIMIT_S):
                self._process.wait(END_LIMIT_S)
            self._process = None

    def _run(self, calls: Sequence[Columns], numbers: Sequence[int]) -> dict[int, Outcome]:
        """Outcomes of the first call at least, and of as many as the process lived through, by ``numbers``."""
        if self._closed:
            raise ScoringError(f"{self.key} {self.name!r} is asked for rewards after it was closed")
        if self._process is None:
            self._start()
        ended: dict[int, Outcome] = {}
        limit = self.timeout_s + (GRACE_S if self.is_async else 0.0)
        try:
            self._connection.send((list(calls), self.timeout_s))
            while len(ended) < len(calls):
                began = time.monotonic()
                with progress.waiting(limit):
                    answered = self._connection.poll(limit)
                if not answered:
                    late = next(call for call, number in zip(calls, numbers, strict=True) if number not in ended)
                    return ended | self._lost(numbers, ended, self.too_late(call_size(late)))
                position, outcome = self._connection.recv()
                if outcome is None:  # one part of the call is done, and the next has the limit for itself
                    continue
                ended[numbers[position]] = outcome
                if not self.is_async:
                    self._slowest_s = max(self._slowest_s or 0.0, time.monotonic() - began)
        except (EOFError, OSError):
            code = self._exit_code()
            killed = code in (-signal.SIGKILL, -signal.SIGTERM)  # by somebody else, such as a system short of memory
            return ended | self._lost(numbers, ended, Failure(f"ended its process (exit code {code})", may_pass=killed))
        return ended

    def _exit_code(self) -> int | None:
        """That of a process which has closed its side of the pipe; None of one that does not end by itself."""
        with suppress(subprocess.TimeoutExpired), progress.waiting(END_LIMIT_S):
            return None if self._process is None else self._process.wait(END_LIMIT_S)
        return None

    def _lost(self, numbers: Sequence[int], ended: dict[int, Outcome], failure: Failure) -> dict[int, Outcome]:
        """End the process; the call that was running in it has failed, or all calls that an async function had begun."""
        self._end()
        running = [number for number in numbers if number not in ended]
        return dict.fromkeys(running if self.is_async else running[:1], failure)

    def _start(self) -> tuple[tuple[str, ...], bool]:
        """Start the process; returns the columns that the function takes, and whether it is asynchronous."""
        self._connection, theirs = Pipe()
        this = os.pidfd_open(os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments, str(theirs.fileno()), str(this)],
            pass_fds=[theirs.fileno(), this],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        os.close(this)
        try:
            with progress.waiting(START_LIMIT_S):
                first_message = self._connection.recv() if self._connection.poll(START_LIMIT_S) else None
        except EOFError:
            first_message = f"{self.key} {self.name!r}: its process ended while it was imported"
        if first_message is None:
            first_message = f"{self.key} {self.name!r}: importing it took more than {START_LIMIT_S:g} s"
        if isinstance(first_message, str):  # why there is no function to call
            self._end()
            raise RequestError(first_message)
        columns, is_async = first_message
        return columns, is_async


def _has_descriptor(stream: Any) -> bool:
    """Whether a stream is a file of the system: one that a test put in place of standard error is none."""
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def run_child(name: str, connection: Connection) -> None:
    """Load the function and answer runs of calls until the parent process is gone."""
    try:
        function = load_function(name)
        connection.send((accepted_columns(name, function), is_async(function)))
    except RequestError as error:
        connection.send(str(error))
        return
    while True:
        try:
            calls, timeout_s = connection.recv()
        except EOFError:
            return
        run_calls(function, calls, timeout_s, lambda number, outcome: connection.send((number, outcome)))


def begin(label: str, connection: str, parent: str) -> Connection:
    """The pipe by its number, in a process that ends with ``parent`` from now on and says its stacks."""
    end_with(int(parent))
    stacks.offer(label)
    return Connection(int(connection))


if __name__ == "__main__":
    run_child(sys.argv[1], begin(f"reward.function {sys.argv[1]}", *sys.argv[2:]))
