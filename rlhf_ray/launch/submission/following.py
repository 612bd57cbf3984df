"""Follow a job to its end: show its log as it grows, and return how it ended.

Invariants: a job counts as ended only if its cluster says so; a log connection that breaks or ends before that is made again,
and no character of the log is shown twice or left out; what a stopped job is said to have ended with is what it wrote
itself as its last line, because Ray keeps no exit code of it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.environment import EXIT_CODE_LINE
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.launch.submission.job_server import ServerAway

SILENCE_S, LONGEST_SILENCE_S = 60.0, 600.0
"""A log connection without a word for so long is made again: a dead one cannot be told from a quiet one. Each time that
nothing had been missed the time doubles, since a log is always sent from its beginning."""
SECONDS_BETWEEN_TRIES = (0.5, 1.0, 2.0, 5.0, 10.0)
AWAY_LIMIT_S = 600.0
"""A cluster that answers nothing for so long is given up."""
TRIES_FOR_THE_REST = 5
_ENDED = re.compile(rf"^{re.escape(EXIT_CODE_LINE)}(\d+)$", re.MULTILINE)


class Server(Protocol):
    """What following needs of a job server."""

    @property
    def address(self) -> str:
        """Where it is."""

    def details(self, job: str) -> Any:
        """Ray's ``JobDetails``; raises :class:`ServerAway` or :class:`JobUnknown`."""

    def log(self, job: str) -> AsyncIterator[str]:
        """The log from its first character on, as it grows; raises :class:`ServerAway`."""

    def whole_log(self, job: str) -> str:
        """The log as it is now; raises :class:`ServerAway` or :class:`JobUnknown`."""


class Log:
    """What has been shown of a log that is sent from its first character at every connection."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.shown = 0
        """How many characters have been shown."""
        self._received = 0
        self._line = ""
        self.exit_code: int | None = None
        """What the job said last about its own end."""

    def connected(self) -> None:
        """The log comes from its first character again."""
        self._received = 0

    def receive(self, text: str) -> None:
        """Show the part of ``text`` that is new."""
        new = text[max(0, self.shown - self._received) :]
        self._received += len(text)
        self.shown = max(self.shown, self._received)
        if not new:
            return
        self._show(new)
        self._line += new
        for code in _ENDED.findall(self._line):
            self.exit_code = int(code)
        self._line = self._line[self._line.rfind("\n", 0, -1) + 1 :][-1000:]  # a chunk may end in the middle of a line


async def follow(server: Server, job: str, log: Log) -> Any:
    """Follow ``job`` to its end and return Ray's details of it.

    Raises :class:`JobUnknown` if its cluster forgot it, and :class:`ServerAway` if the cluster is gone for good.
    """
    asyncio.get_running_loop().set_exception_handler(_except_interrupts)
    failures, told, silence_s = 0, False, SILENCE_S
    while True:
        details = await _details(server, job)
        if details.status.is_terminal():
            await _show_rest(server, job, log)
            return details
        shown = log.shown
        try:
            await _show(server, job, log, silence_s)
            failures = 0
        except ServerAway as error:
            failures += 1
            if not told:
                get_logger().info("the connection to the log of %s broke (%s): following it again", job, error)
                told = True
        silence_s = SILENCE_S if log.shown > shown else min(2 * silence_s, LONGEST_SILENCE_S)
        await _pause(failures)


async def _details(server: Server, job: str) -> Any:
    """The cluster's answer about the job, which is asked for again while the cluster is away."""
    failures, since = 0, time.monotonic()
    while True:
        try:
            return server.details(job)
        except (ServerAway, RequestError) as error:  # the second: a proxy, or a token that was changed; the job goes on
            if time.monotonic() - since > AWAY_LIMIT_S:
                raise ServerAway(
                    f"{job} may still go on, but nothing is known of it: its cluster has not answered for {AWAY_LIMIT_S:g} s "
                    f"({error})"
                ) from error
            if failures == 0:
                get_logger().warning("%s: asking again how %s is", error, job)
            failures += 1
            await _pause(failures)


async def _show(server: Server, job: str, log: Log, silence_s: float) -> None:
    """Show what is new in the log until the connection ends, or has been silent for so long."""
    log.connected()
    lines = aiter(server.log(job))
    with suppress(StopAsyncIteration, TimeoutError):
        while True:
            log.receive(await asyncio.wait_for(anext(lines), silence_s))


async def _show_rest(server: Server, job: str, log: Log) -> None:
    """Show what a connection that was cut left out of the log of a job that has ended."""
    for failures in range(1, TRIES_FOR_THE_REST + 1):
        try:
            whole = server.whole_log(job)
        except RlhfRayError as error:
            if failures == TRIES_FOR_THE_REST:
                get_logger().warning("the end of the log of %s cannot be read: %s", job, error)
            else:
                await _pause(failures)
            continue
        log.connected()
        log.receive(whole)
        return


def _except_interrupts(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Let the loop show no trace of an interrupt that met a task, and has been raised already."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


async def _pause(failures: int) -> None:
    await asyncio.sleep(SECONDS_BETWEEN_TRIES[min(failures, len(SECONDS_BETWEEN_TRIES) - 1)])
