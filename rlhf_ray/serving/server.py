"""A web server: one ASGI app on one port, in a thread of its own.

Invariants: the port is taken before anything slow begins, so that a port in use is an error at once; nothing listens before
``start``; after ``start`` the address answers; headers that say whom a request comes from count only where they come from a
proxy that is trusted; ``stop`` lets requests under way finish for a while, and then has those that are left told so; memory
that requests took is soon the system's again.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from rlhf_ray import environment
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.network import is_every_address, outward_address
from rlhf_ray.serving.transport.connection import Connection, ConnectionLimits

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection: they close it first, and never send into one that the server closes."""
START_TIMEOUT_S = 20.0
SECONDS_BETWEEN_RETURNS = 5.0
"""After how long freed memory goes back to the system, which takes hundredths of a second."""
FINISH_TIMEOUT_S, LAST_ANSWERS_S = 10.0, 2.0
"""How long requests under way may go on after a stop, and how long the answers of those that did not end are sent."""


class WebServer:
    """A port and the server behind it."""

    loop: asyncio.AbstractEventLoop
    """The event loop that the app runs in, from ``start`` on."""

    def __init__(
        self, host: str, port: int, *, limits: ConnectionLimits | None = None, trusted_proxies: Sequence[str] = ()
    ) -> None:
        self._limits = ConnectionLimits() if limits is None else limits
        self._trusted_proxies = list(trusted_proxies)
        self._give_up: Callable[[], None] = _nothing
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except (OSError, TypeError, UnicodeError) as error:  # a name with letters that no host has is one of the latter
            self._socket.close()
            reason = (error.strerror or error) if isinstance(error, OSError) else "no host has such a name"
            raise RequestError(
                f"{host}:{port} cannot be listened on ({reason}): choose another host or port (port=0 takes a free one)"
            ) from error
        listens_at, bound = self._socket.getsockname()[:2]
        if is_every_address(listens_at):
            host, family = outward_address(), socket.AF_INET
        self.address = f"http://[{host}]:{bound}" if family == socket.AF_INET6 else f"http://{host}:{bound}"
        """Where others reach the server, or this machine alone if it listens on loopback."""
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: ASGIApp, *, give_up: Callable[[], None] | None = None) -> None:
        """Answer with ``app`` from now on; returns when the address answers.

        ``give_up`` is called in the loop when the time is over that a stop gives to requests; it has them answered at once.
        """
        self._give_up = give_up or _nothing
        config = uvicorn.Config(
            app,
            # uvicorn calls it to make a protocol, but its type asks for a class
            http=partial(Connection, limits=self._limits),  # type: ignore[arg-type]
            ws="none",
            log_level="error",
            proxy_headers=bool(self._trusted_proxies),
            forwarded_allow_ips=self._trusted_proxies,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(FINISH_TIMEOUT_S + LAST_ANSWERS_S),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._run, args=(config.get_loop_factory(),), name="web server", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RlhfRayError(f"the web server did not start at {self.address}")
            time.sleep(0.01)

    def _run(self, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        assert self._server is not None, "start sets it before this runs"
        self.loop = asyncio.get_running_loop()
        returning = asyncio.create_task(_return_memory())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            returning.cancel()

    def stop(self) -> None:
        """Let requests under way finish, then close the port."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(FINISH_TIMEOUT_S)
            if self._thread.is_alive():
                self.loop.call_soon_threadsafe(self._give_up)
                self._thread.join(LAST_ANSWERS_S + 3.0)
        self._socket.close()


async def _return_memory() -> None:
    while True:
        await asyncio.sleep(SECONDS_BETWEEN_RETURNS)
        await asyncio.to_thread(environment.return_freed_memory)


def _nothing() -> None:
    """What an app without an answer for requests that are given up does."""
