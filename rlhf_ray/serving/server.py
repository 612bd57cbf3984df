"""One ASGI app on one port, in a thread.

Always true: the port is taken before anything slow begins, so that a taken one is an error at once; nothing listens before
``start``; after ``start`` the address answers; ``stop`` lets what is being answered finish, for a while.
"""

from __future__ import annotations

import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from rlhf_ray.errors import RequestError, RlhfRayError

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that they close it first and send into no closed one."""
START_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 10


class WebServer:
    """A port, and what answers there."""

    def __init__(self, host: str, port: int) -> None:
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
        """Answer with ``app`` from now on."""
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FINISH_TIMEOUT_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="web server", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RlhfRayError(f"the web server did not start at {self.address}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Answer no longer."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(FINISH_TIMEOUT_S + 5)
        self._socket.close()
