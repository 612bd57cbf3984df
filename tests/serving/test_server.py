"""The port is taken before anything slow begins; nothing listens before ``start``, and after it the address answers;
``stop`` lets what is being answered finish.
"""

from __future__ import annotations

import asyncio
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.network import outward_address
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.server import WebServer
from rlhf_ray.serving.transport.connection import MAX_HEADER_BYTES, ConnectionLimits

from .services import Lengths, service


class Slow(Lengths):
    """Scores every item as 0.5 once it may."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.began, self.may = threading.Event(), threading.Event()
        self.scored: list[str | None] = []

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        self.began.set()
        self.scored += [request.text for request in requests]
        while not self.may.is_set():
            await asyncio.sleep(0.005)
        return [ScoreResult.of(0.5)] * len(requests)


@pytest.fixture
def server() -> Iterator[WebServer]:
    server = WebServer("127.0.0.1", 0)
    yield server
    server.stop()


def place(server: WebServer) -> tuple[str, int]:
    url = httpx.URL(server.address)
    assert url.port is not None
    return url.host, url.port


def test_nothing_listens_before_start_and_then_the_address_answers(
    server: WebServer, config: Callable[..., ServeConfig]
) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.address}/health")
    server.start(service(config(), Slow()))
    socket.create_connection(place(server)).close()  # at once: nothing is slow about this
    assert httpx.get(f"{server.address}/health").status_code == 200


def test_nothing_answers_after_stop(config: Callable[..., ServeConfig]) -> None:
    before = threading.active_count()
    server = WebServer("127.0.0.1", 0)
    server.start(service(config(), Slow()))
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.address}/health")
    assert threading.active_count() == before


def test_a_taken_port_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=rf"127.0.0.1:{port} cannot be listened on .*port=0 takes a free one"):
            WebServer("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"192.0.2.1:0 cannot be listened on"):
        WebServer("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["ü..x", "a..b", "x" * 300, ".", "\0"])
def test_a_name_that_no_host_has_is_an_error(host: str) -> None:
    try:
        error: Exception | None = None
        WebServer(host, 0)
    except Exception as raised:
        error = raised
    assert isinstance(error, RequestError) and "cannot be listened on" in str(error)
    assert "choose another host or port" in str(error)


def test_ipv6_is_written_as_addresses_are() -> None:
    try:
        server = WebServer("::1", 0)
    except RequestError:
        pytest.skip("this machine has no IPv6 loopback")
    assert server.address == f"http://[::1]:{httpx.URL(server.address).port}"
    server.stop()


def test_stop_lets_a_request_finish(config: Callable[..., ServeConfig]) -> None:
    backend, server = Slow(), WebServer("127.0.0.1", 0)
    server.start(service(config(), backend))
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(httpx.post, f"{server.address}/get_reward", json={"query": ["a"]})
        assert backend.began.wait(5)
        stopping = pool.submit(server.stop)
        time.sleep(0.2)
        backend.may.set()
        stopping.result(timeout=10)
        assert asking.result(timeout=10).json()["rewards"] == [0.5]


def test_a_client_that_hangs_up_is_not_scored(server: WebServer, config: Callable[..., ServeConfig]) -> None:
    backend = Slow()
    server.start(service(config(), backend))
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.post, f"{server.address}/get_reward", json={"query": ["busy"]})
        assert backend.began.wait(5)
        body = b'{"query": ["gone"]}'
        with socket.create_connection(place(server)) as leaving:
            head = f"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            leaving.sendall(head.encode() + body)
            wait_for(server, "rlhf_scoring_waiting_items 1.0")
        wait_for(server, "rlhf_scoring_waiting_items 0.0")
        backend.may.set()
        assert busy.result(timeout=10).status_code == 200
    assert backend.scored == ["busy"]


def wait_for(server: WebServer, line: str) -> None:
    deadline = time.monotonic() + 10
    while line not in (text := httpx.get(f"{server.address}/metrics").text):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_headers_that_do_not_arrive_are_not_waited_for(config: Callable[..., ServeConfig], begun: bytes) -> None:
    server = WebServer("127.0.0.1", 0, limits=ConnectionLimits(header_timeout_s=0.3))
    server.start(service(config(), Slow()))
    try:
        began = time.monotonic()
        with socket.create_connection(place(server)) as slow:
            slow.sendall(begun)
            slow.settimeout(10)
            assert slow.recv(100) == b""
        assert 0.2 < time.monotonic() - began < 5
        with httpx.Client(base_url=server.address) as client:  # a connection that idles between requests stays
            assert client.get("/health").status_code == 200
            time.sleep(0.6)
            assert client.get("/health").status_code == 200
    finally:
        server.stop()


def test_headers_without_end_are_not_read(server: WebServer, config: Callable[..., ServeConfig]) -> None:
    server.start(service(config(), Slow()))
    with socket.create_connection(place(server)) as endless:
        endless.settimeout(10)
        endless.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(OSError):
            for _ in range(1000):
                endless.sendall(b"x" * MAX_HEADER_BYTES)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_a_server_at_every_address_says_one_at_which_others_reach_it(host: str) -> None:
    server = WebServer(host, 0)
    try:
        url = httpx.URL(server.address)
        assert url.host == outward_address()
        assert url.port is not None and url.port > 0
    finally:
        server.stop()


HOLDING = """
import time
import psutil
from rlhf_ray.serving import server
server.SECONDS_BETWEEN_RETURNS = 0.2
async def app(scope, receive, send):
    pass
web_server = server.WebServer("127.0.0.1", 0)
web_server.start(app)
memory = lambda: psutil.Process().memory_full_info().uss / 2**20
before = memory()
blocks = [bytes(1000) for _ in range(200_000)]
last = blocks.pop()  # nothing below it is given back by itself
held = memory()
del blocks
deadline = time.monotonic() + 20
while memory() - before > 20 and time.monotonic() < deadline:
    time.sleep(0.1)
print(held - before, memory() - before)
web_server.stop()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates here")
def test_memory_that_requests_took_is_the_systems_again() -> None:
    printed = subprocess.run([sys.executable, "-c", HOLDING], capture_output=True, text=True, check=True).stdout
    held, kept = (float(megabytes) for megabytes in printed.split())
    assert held > 150 and kept < 20, (held, kept)
