"""One connection of a client: uvicorn's HTTP protocol with limits on everything that a client can leave undone.

Invariants: headers that do not arrive in time, or are too large, close the connection; so do an answer that is not read, and a
body that goes on after its answer; a client that has closed its sending side gets its answer, if it is still there; where
connections run out, the one that has done nothing for longest gives way, of the client that has most, or where none is idle the
one that sends its body for longest.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rlhf_ray.serving.auth import KEY

MAX_HEADER_BYTES = 65_536
LINGER_S, LINGER_BYTES = 2.0, 262_144
"""How long, and how much of, a body is still taken and thrown away after its answer: a client that sends and does not read yet
would otherwise lose the answer."""
SECONDS_BETWEEN_LOOKS = 0.25
"""At a client that has closed its sending side, for whether it is gone."""
FILES_OF_OUR_OWN = 256
"""File descriptors that are kept back from connections."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Every client of HTTP/1.1 reads over it; that of one which is gone is answered with a reset by its machine."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may leave undone for how long, and how many there may be."""

    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    connections: int = 0
    """0 means as many as the process may open files, but for a few."""

    @property
    def most(self) -> int:
        """How many connections there may be."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = files == resource.RLIM_INFINITY
        return self.connections or (1_000_000 if unlimited else max(files - FILES_OF_OUR_OWN, files // 2))


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP protocol; by itself it waits for ever, for headers, for bodies and for answers to be read."""

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._limits = limits
        self._header_bytes = self._thrown_away = 0
        self._headers_due: asyncio.TimerHandle | None = None
        self._answer_due: asyncio.TimerHandle | None = None
        self._body_due: asyncio.TimerHandle | None = None
        self.since = 0.0
        """When it was made, or a request of it began or was answered, in seconds of the loop."""
        self.idle_since: float | None = None
        """When its last request was answered, in seconds of the loop; none while a request is being answered."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = self.idle_since = self.loop.time()
        self._await_headers()
        if len(self.connections) > self._limits.most:
            self._make_room()

    def _make_room(self) -> None:
        """Close a connection of the client that has most of them: its idlest, or the one that sends its body for longest.

        This one is closed where every other waits for its scores.
        """
        others = [one for one in self.connections if isinstance(one, Connection)]
        of_owner = Counter(one.owner for one in others)
        idle = [one for one in others if one is not self and one.idle_since is not None]
        sending = [one for one in others if one.idle_since is None and one.cycle is not None and one.cycle.more_body]
        victim = max(idle or sending, key=lambda one: (of_owner[one.owner], -one.since), default=self)
        victim.drop()
        self.connections.discard(victim)

    def drop(self) -> None:
        """Close the connection at once; an answer that is under way is not written any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # uvloop tells it a moment later, and raises at a write before that
            self.cycle.message_event.set()
        self.transport.abort()

    @property
    def owner(self) -> tuple[str, str]:
        """Whose connection it is: the machine's, and from its first request on also the key's."""
        key = (self.scope or {}).get(KEY)
        return self.client[0] if self.client else "", str(key or "")

    def data_received(self, data: bytes) -> None:
        if self._body_due is not None:
            self._thrown_away += len(data)
            if self._thrown_away > LINGER_BYTES:
                self.drop()
                return
        super().data_received(data)
        self._header_bytes += len(data)
        if self._headers_due is not None and self._header_bytes > MAX_HEADER_BYTES:
            self.drop()

    def on_message_begin(self) -> None:
        if self._headers_due is None:
            self._await_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._headers_due = _cancel(self._headers_due)
        self.since, self.idle_since = self.loop.time(), None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_due = _cancel(self._body_due)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # what is left of the answer must be read in time, too
            self.await_reading()
        elif self.cycle.response_complete:  # else a pipelined request is being answered
            self.since = self.idle_since = self.loop.time()
            if self.cycle.more_body:
                self._thrown_away = 0
                self._body_due = self.loop.call_later(LINGER_S, self.drop)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.await_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.await_reading()

    def await_reading(self) -> None:
        """Give the client its time to read the answer."""
        if self._answer_due is None:
            self._answer_due = self.loop.call_later(self._limits.write_timeout_s, self.drop)

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._answer_due = _cancel(self._answer_due)
        super().resume_writing()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # the parent says None, asyncio asks for either
        """Keep a connection whose client waits for an answer and sends nothing more; close any other."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return None
        self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.1" and not self.cycle.response_started:
            self.transport.write(CONTINUE)
        self._look_for_client()
        return True

    def _look_for_client(self) -> None:
        """Nothing is read any more, so that a reset shows only as an error of the socket."""
        if self.transport.is_closing():
            return
        known = self.transport.get_extra_info("socket")
        if known.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.drop()
            return
        self.loop.call_later(SECONDS_BETWEEN_LOOKS, self._look_for_client)

    def connection_lost(self, exc: Exception | None) -> None:
        for due in (self._headers_due, self._answer_due, self._body_due):
            _cancel(due)
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._header_bytes = 0
        self._headers_due = self.loop.call_later(self._limits.header_timeout_s, self.drop)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; returns what takes its place, which is none."""
    if timer is not None:
        timer.cancel()
    return None
