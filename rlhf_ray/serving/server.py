"""A web server: one ASGI app on one port, in a thread of its own.

Invariants: the port is taken before anything slow begins, so that a port in use is an error at once; nothing listens before
``start``; after ``start`` the address answers; a connection whose headers do not arrive in time, or are too large, is closed;
``stop`` lets requests under way finish, for a while.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rlhf_ray.errors import RequestError, RlhfRayError

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection: they close it first, and never send into one that the server closes."""
MAX_HEADER_BYTES = 65_536
START_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 10


class HeaderDeadline(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits: by itself it waits for headers for ever, and reads any number of them."""

    def __init__(self, *arguments: Any, header_timeout_s: float, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._header_timeout_s = header_timeout_s
        self._waiting: asyncio.TimerHandle | None = None
        self._header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._header_bytes += len(data)
        if self._waiting is not None and self._header_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        if self._waiting is None:
            self._begin()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        loop, self._header_bytes = asyncio.get_running_loop(), 0
        self._waiting = loop.call_later(self._header_timeout_s, self.transport.close)

    def _end(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class WebServer:
    """A port and the server behind it."""

    loop: asyncio.AbstractEventLoop
    """The event loop that the app runs in, from ``start`` on."""

    def __init__(self, host: str, port: int, *, header_timeout_s: float = 10.0) -> None:
        self._header_timeout_s = header_timeout_s
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise RequestError(
                f"{host}:{port} cannot be listened on ({error.strerror or error}): choose another host or port "
                "(port=0 takes a free one)"
            ) from error
        bound = self._socket.getsockname()[1]
        self.address = f"http://[{host}]:{bound}" if family == socket.AF_INET6 else f"http://{host}:{bound}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: ASGIApp) -> None:
        """Answer with ``app`` from now on; returns when the address answers."""
        config = uvicorn.Config(
            app,
            # uvicorn calls it to make a protocol, but its type asks for a class
            http=partial(HeaderDeadline, header_timeout_s=self._header_timeout_s),  # type: ignore[arg-type]
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FINISH_TIMEOUT_S,
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
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Let requests under way finish, then close the port."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(FINISH_TIMEOUT_S + 5)
        self._socket.close()
