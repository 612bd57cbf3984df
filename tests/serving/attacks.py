"""What a greedy or hostile caller of a service does, as a program of its own, so that it takes none of the service's threads.

    python -m tests.serving.attacks NAME HOST PORT TOKEN SECONDS

Every attack goes on for its seconds, from several connections at once, and ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CHUNK = 65_536


@dataclass(frozen=True)
class Caller:
    """Where the service is, with which token it is called, and for how long."""

    host: str
    port: int
    token: str
    until: float
    """In seconds of the monotonic clock."""

    @property
    def over(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() >= self.until

    def connect(self, timeout_s: float = 60.0) -> socket.socket:
        """A connection."""
        connection = socket.create_connection((self.host, self.port), timeout=10)
        connection.settimeout(timeout_s)
        return connection

    def head(self, path: str, *lines: str, token: str | None = None) -> bytes:
        """The headers of a request."""
        bearer = self.token if token is None else token
        start = f"POST {path} HTTP/1.1", f"Host: {self.host}", f"Authorization: Bearer {bearer}"
        return "\r\n".join([*start, *lines, "", ""]).encode()

    def post(self, body: bytes, path: str = "/v1/reward") -> None:
        """Send a body and wait for the answer."""
        with self.connect() as connection:
            connection.sendall(self.head(path, f"Content-Length: {len(body)}", "Connection: close") + body)
            while connection.recv(CHUNK):
                pass

    def again_and_again(self, once: Callable[[], None], *, connections: int) -> None:
        """Do something on so many connections at once until the time is up; a closed connection is no error."""

        def work() -> None:
            while not self.over:
                with contextlib.suppress(OSError):
                    once()

        threads = [threading.Thread(target=work) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def wait(self) -> None:
        """Until the time is up."""
        while not self.over:
            time.sleep(0.05)


def ones(caller: Caller) -> None:
    """Eight megabytes of numbers where items belong."""
    body = b'{"items":[' + b"1," * 3_990_000 + b"1]}"
    caller.again_and_again(lambda: caller.post(body), connections=8)


def wide(caller: Caller) -> None:
    """Millions of empty lists under a key of a message that nothing reads."""
    body = b'{"items":[{"messages":[{"role":"user","content":"a","x":[' + b"[]," * 2_600_000 + b"1]}]}]}"
    caller.again_and_again(lambda: caller.post(body), connections=3)


def deep(caller: Caller) -> None:
    """A million lists inside one another."""
    body = b'{"items":' + b"[" * 1_000_000
    caller.again_and_again(lambda: caller.post(body), connections=3)


def long_texts(caller: Caller) -> None:
    """One text of eight megabytes, from four senders."""
    body = json.dumps({"items": [{"text": "word and word " * 570_000}]}).encode()
    caller.again_and_again(lambda: caller.post(body), connections=4)


def many_items(caller: Caller) -> None:
    """As many items as a request may have, all the time."""
    body = json.dumps({"items": [{"text": f"item {number} of many " * 8} for number in range(1024)]}).encode()
    caller.again_and_again(lambda: caller.post(body), connections=16)


def silent(caller: Caller) -> None:
    """Forty chunked requests that send nothing."""

    def once() -> None:
        with caller.connect() as connection:
            connection.sendall(caller.head("/v1/reward", "Transfer-Encoding: chunked"))
            while not caller.over and connection.recv(CHUNK):
                pass

    caller.again_and_again(once, connections=40)


def half_sent(caller: Caller) -> None:
    """Forty bodies of which the last byte never comes."""
    body = json.dumps({"items": [{"text": "x" * 7_000_000}]}).encode()

    def once() -> None:
        with caller.connect() as connection:
            connection.sendall(caller.head("/v1/reward", f"Content-Length: {len(body) + 1}") + body)
            connection.settimeout(0.5)
            while not caller.over:
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(CHUNK):
                        return

    caller.again_and_again(once, connections=40)


def unread(caller: Caller) -> None:
    """Sixty connections that never read an answer."""
    body = json.dumps({"items": [{"text": "a"}] * 1024}).encode()

    def once() -> None:
        with caller.connect(timeout_s=1.0) as connection:
            while not caller.over:
                with contextlib.suppress(TimeoutError):
                    connection.sendall(caller.head("/v1/reward", f"Content-Length: {len(body)}") + body)

    caller.again_and_again(once, connections=60)


def uploads(caller: Caller) -> None:
    """Four uploads without end and without a token."""

    def once() -> None:
        with caller.connect() as connection:
            connection.sendall(caller.head("/v1/reward", "Transfer-Encoding: chunked", token="no-such-token"))
            while not caller.over:
                connection.sendall(b"%x\r\n%s\r\n" % (CHUNK, b"x" * CHUNK))

    caller.again_and_again(once, connections=4)


def idle(caller: Caller) -> None:
    """Six hundred connections that do nothing."""
    with contextlib.ExitStack() as connections:
        for _ in range(600):
            with contextlib.suppress(OSError):
                connections.enter_context(caller.connect())
        caller.wait()


def probes(caller: Caller) -> None:
    """Everybody asks whether the service is ready."""

    def once() -> None:
        with caller.connect() as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while connection.recv(CHUNK):
                pass

    caller.again_and_again(once, connections=8)


ATTACKS: dict[str, Callable[[Caller], None]] = {
    attack.__name__: attack
    for attack in (ones, wide, deep, long_texts, many_items, silent, half_sent, unread, uploads, idle, probes)
}


def commands(host: str, port: int, token: str, seconds: float) -> Iterator[tuple[str, list[str]]]:
    """Each attack by its name, as a command line."""
    for name in ATTACKS:
        yield name, [sys.executable, "-m", "tests.serving.attacks", name, host, str(port), token, str(seconds)]


def main() -> None:
    """One attack."""
    name, host, port, token, seconds = sys.argv[1:]
    ATTACKS[name](Caller(host, int(port), token, time.monotonic() + float(seconds)))


if __name__ == "__main__":
    main()
