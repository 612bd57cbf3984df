"""Brings one replica of a served model back after it failed, however long that takes.

Invariants: all who meet the failure share one recovery; it tries again until the replica is back, with growing pauses, and no
error of an attempt ends it or the service; who waits for it may give up, the recovery goes on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError, RlhfRayError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two attempts: doubled after every failure, up to the longest."""


class Recovery:
    """The restarts of one replica; ``restart`` is one attempt, ``on_attempt`` is called before each."""

    def __init__(
        self,
        name: str,
        restart: Callable[[], Awaitable[None]],
        *,
        on_attempt: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._restart, self._on_attempt, self._clock = name, restart, on_attempt, clock
        self._running: asyncio.Task[None] | None = None
        self.down_since = math.inf
        """When the replica failed, in seconds of the clock; infinite while it works."""

    @property
    def down(self) -> bool:
        """Whether the replica is being brought back."""
        return self._running is not None and not self._running.done()

    def begin(self) -> asyncio.Task[None]:
        """Bring the replica back, unless that is under way; the task ends when it is back."""
        if self._running is None or self._running.done():
            self.down_since = self._clock()
            self._running = asyncio.get_running_loop().create_task(self._until_back())
        return self._running

    async def back(self, deadline: float) -> None:
        """Return when the replica is back; raises :class:`GroupError` at ``deadline``, in seconds of the clock."""
        recovering = self.begin()
        await asyncio.wait({recovering}, timeout=max(deadline - self._clock(), 0.0))
        if not recovering.done():
            raise GroupError("reward", None, "restart", "it did not come back in time")

    async def up(self, timeout_s: float) -> None:
        """Return when no recovery is under way, or after ``timeout_s``."""
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=timeout_s)

    def cancel(self) -> None:
        """Stop trying: the replica is given up."""
        if self._running is not None:
            self._running.cancel()

    async def _until_back(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            self._on_attempt()
            try:
                await self._restart()
            except Exception as error:
                cause = str(error).partition("\n")[0] if isinstance(error, RlhfRayError) else type(error).__name__
                get_logger("serving").error(
                    "%s: the reward group does not come back (%s): trying again in %g s, down for %.0f s",
                    self._name,
                    cause,
                    pause,
                    self._clock() - self.down_since,
                )
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                get_logger("serving").info("%s: the reward group is back", self._name)
                self.down_since = math.inf
                return
