"""A connection is closed where its client leaves something undone: headers, a refused body, an answer that is not read; a
client that only stopped sending gets its answer; who has many idle connections loses them first.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.serving.server import WebServer
from rlhf_ray.serving.transport.connection import LINGER_BYTES, Connection, ConnectionLimits

from .services import Lengths, service
from .test_server import Slow, place, wait_for

TOKEN = "a-token-of-some-length"
MakeConfig = Callable[..., ServeConfig]


@contextmanager
def serving(app: Any, limits: ConnectionLimits | None = None, **settings: Any) -> Iterator[WebServer]:
    server = WebServer("127.0.0.1", 0, limits=limits, **settings)
    server.start(app, give_up=app.state.give_up)
    try:
        yield server
    finally:
        server.stop()


def connect(server: WebServer) -> socket.socket:
    connection = socket.create_connection(place(server))
    connection.settimeout(10)
    return connection


def head(path: str = "/get_reward", **headers: object) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def post(body: bytes, path: str = "/get_reward", **headers: object) -> bytes:
    return head(path, Content_Length=len(body), **headers) + body


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the final answer; the connection must end with it, or it must say its length."""
    content = b""
    while b"\r\n\r\n" not in content or content.startswith(b"HTTP/1.1 100"):
        if content.startswith(b"HTTP/1.1 100") and b"\r\n\r\n" in content:
            content = content.partition(b"\r\n\r\n")[2]
            continue
        received = connection.recv(65536)
        assert received, f"the connection ended after {content!r}"
        content += received
    start, _, body = content.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in start.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while len(body) < lengths[0]:
        body += connection.recv(65536)
    return int(start.split()[1]), body


def test_bodies_that_never_come_take_no_connection_from_another(config: MakeConfig) -> None:
    slow = ConnectionLimits(connections=8)
    with serving(service(config(body_timeout_s=30.0), Lengths(), keys=lambda: KEYS), slow) as server:
        silent = [connect(server) for _ in range(8)]
        try:
            for one in silent:
                one.sendall(head(Content_Length=100, Authorization=f"Bearer {'a' * 20}"))
            time.sleep(0.5)
            with connect(server) as victim:
                victim.sendall(post(b'{"query": ["abc"]}', Authorization=f"Bearer {'b' * 20}"))
                assert answer_or_nothing(victim) == 200, "who sends nothing has taken every connection"
            assert sum(is_closed(one) for one in silent) == 1
        finally:
            for one in silent:
                one.close()


KEYS = {"a" * 20: "attacker", "b" * 20: "victim"}


def answer_or_nothing(connection: socket.socket) -> int | None:
    try:
        return answer(connection)[0]
    except (AssertionError, ConnectionError):
        return None


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def sent_until_closed(connection: socket.socket, most: int = 500_000_000) -> int:
    """Bytes of an upload that the server takes before it closes the connection."""
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    try:
        while sent < most:
            connection.sendall(chunk)
            sent += len(chunk)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize("keys", [{TOKEN: "a"}, None], ids=["without a token", "too large"])
def test_an_upload_that_is_refused_is_not_taken(config: MakeConfig, keys: dict[str, str] | None) -> None:
    options: dict[str, Any] = {} if keys is None else {"keys": lambda: keys}
    with serving(service(config(max_body_bytes=100_000), Slow(), **options)) as server, connect(server) as endless:
        endless.sendall(head(Transfer_Encoding="chunked"))
        assert sent_until_closed(endless) < LINGER_BYTES + 20_000_000, "what socket buffers hold, and no more"


def test_a_small_body_that_is_refused_costs_the_connection_nothing(config: MakeConfig) -> None:
    with serving(service(config(), Lengths(), keys=lambda: {TOKEN: "a"})) as server, connect(server) as connection:
        body = json.dumps({"query": ["abc"]}).encode()
        for _ in range(2):
            connection.sendall(head(Content_Length=len(body)))
            assert answer(connection)[0] == 401
            connection.sendall(body)
        connection.sendall(post(body, Authorization=f"Bearer {TOKEN}"))
        status, content = answer(connection)
        assert (status, json.loads(content)["rewards"]) == (200, [3.0])


def test_a_client_that_does_not_read_its_answers_is_given_up(config: MakeConfig) -> None:
    app = service(config(max_items=1024), Lengths())
    with serving(app, ConnectionLimits(write_timeout_s=0.3)) as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that answers are soon held by the server
        deaf.connect(place(server))
        body = json.dumps({"items": [{"text": "a"}] * 1000}).encode()
        deaf.settimeout(0.2)
        closed = time.monotonic() + 10
        ended = False
        while not ended and time.monotonic() < closed:
            try:
                deaf.sendall(post(body, "/v1/reward"))
            except TimeoutError:
                continue  # nothing is read of it while an answer waits
            except OSError:
                ended = True
        assert ended, "its connection was held for ever"


def test_nothing_is_written_to_a_connection_that_was_dropped(config: MakeConfig) -> None:
    """uvloop raises at such a write, and uvicorn logs its trace, until the loop has told both that the connection is lost."""
    backend = Slow()
    with serving(service(config(), backend)) as server, connect(server) as connection:
        connection.sendall(post(b'{"query": ["a"]}'))
        assert backend.began.wait(5)

        async def drop() -> bool:
            assert server._server is not None
            (one,) = server._server.server_state.connections
            assert isinstance(one, Connection)
            one.drop()
            return one.cycle.disconnected

        assert asyncio.run_coroutine_threadsafe(drop(), server.loop).result(5)
        backend.may.set()


def test_a_client_that_has_stopped_sending_gets_its_answer(config: MakeConfig) -> None:
    backend = Slow()
    with serving(service(config(), backend)) as server, connect(server) as half:
        half.sendall(post(b'{"query": ["a"]}'))
        half.shutdown(socket.SHUT_WR)
        assert backend.began.wait(5)
        time.sleep(0.6)
        backend.may.set()
        status, content = answer(half)
        assert (status, json.loads(content)["rewards"]) == (200, [0.5])
        assert half.recv(100) == b"", "and then the connection ends"


def test_a_client_of_http_1_0_that_has_stopped_sending_gets_its_answer_alone(config: MakeConfig) -> None:
    with serving(service(config(), Lengths())) as server, connect(server) as half:
        half.sendall(post(b'{"query": ["ab"]}').replace(b"HTTP/1.1", b"HTTP/1.0"))
        half.shutdown(socket.SHUT_WR)
        content = b"".join(iter(lambda: half.recv(65536), b""))
        assert content.startswith(b"HTTP/1.1 200") and b"[2.0]" in content


def test_who_has_most_idle_connections_loses_them_first(config: MakeConfig) -> None:
    with serving(service(config(), Lengths()), ConnectionLimits(connections=8)) as server:
        host, port = place(server)
        victim = socket.create_connection((host, port), source_address=("127.0.0.2", 0))
        idle = [connect(server) for _ in range(40)]
        try:
            victim.settimeout(10)
            victim.sendall(post(b'{"query": ["abc"]}'))
            assert answer(victim)[0] == 200
            assert sum(is_closed(one) for one in idle) == 40 - 7
        finally:
            for one in [victim, *idle]:
                one.close()


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "TLS/1.0"])
def test_another_protocol_is_refused_by_name_and_not_as_an_empty_body(config: MakeConfig, upgrade: str) -> None:
    with serving(service(config(), Lengths())) as server, connect(server) as connection:
        connection.sendall(post(b'{"query": ["abc"]}', Connection="Upgrade, HTTP2-Settings", Upgrade=upgrade))
        status, content = answer(connection)
        assert (status, json.loads(content)["kind"]) == (400, "upgrade")
    twice = post(b'{"query": ["abc"]}', Upgrade=upgrade).replace(
        b"\r\n", b"\r\nConnection: keep-alive\r\nConnection: Upgrade\r\n", 1
    )
    with serving(service(config(), Lengths())) as server, connect(server) as connection:
        connection.sendall(twice)
        status, content = answer(connection)
        assert (status, json.loads(content)["kind"]) == (400, "upgrade")


@pytest.mark.parametrize("path", ["/get_reward/", "/v1/reward/", "/health/"])
def test_no_redirection_leads_to_the_host_that_a_request_names(config: MakeConfig, path: str) -> None:
    with serving(service(config(), Lengths())) as server:
        response = httpx.post(f"{server.address}{path}", json={}, headers={"Host": "evil.example"})
        assert (response.status_code, response.headers.get("location")) == (404, None)
        assert response.json()["kind"] == "not_found"


def test_only_a_trusted_proxy_says_who_a_caller_is(config: MakeConfig) -> None:
    def statuses(**settings: Any) -> list[int]:
        with serving(service(config(requests_per_minute=2), Lengths()), **settings) as server:
            return [
                httpx.post(
                    f"{server.address}/get_reward",
                    json={"query": ["a"]},
                    headers={"X-Forwarded-For": f"10.0.0.{number}"},
                ).status_code
                for number in range(5)
            ]

    assert statuses() == [200, 200, 429, 429, 429]
    assert statuses(trusted_proxies=("127.0.0.1",)) == [200] * 5
    assert statuses(trusted_proxies=("10.9.9.9",)) == [200, 200, 429, 429, 429]


def test_requests_that_outlast_a_stop_are_told_so_and_the_log_holds_no_trace(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr("rlhf_ray.serving.server.FINISH_TIMEOUT_S", 0.5)
    backend = Slow()
    with ThreadPoolExecutor(3) as pool, serving(service(config(), backend)) as server, connect(server) as reading:
        scored = pool.submit(httpx.post, f"{server.address}/get_reward", json={"query": ["a"]}, timeout=20)
        assert backend.began.wait(5)
        logging.getLogger("uvicorn.error").addHandler(handler := logging.StreamHandler(project_log))
        queued = pool.submit(httpx.post, f"{server.address}/classify", json={"input": ["a"]}, timeout=20)
        wait_for(server, "rlhf_scoring_waiting_items 1.0")
        reading.sendall(head("/v1/reward", Content_Length=1000) + b"{")
        time.sleep(0.1)
        server.stop()
        assert (scored.result(5).status_code, queued.result(5).status_code) == (503, 503)
        assert (scored.result(5).json()["kind"], queued.result(5).json()["error"]["type"]) == ("stopping", "stopping")
        assert answer(reading)[0] == 503
        backend.may.set()
    logging.getLogger("uvicorn.error").removeHandler(handler)
    assert "Traceback" not in project_log.getvalue()
