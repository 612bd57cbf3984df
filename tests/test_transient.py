"""What may pass by waiting: connections, timeouts and overloads, as the libraries raise them; nothing else."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import Any

import httpx
import pytest
import requests

from rlhf_ray.transient import may_pass


def raised(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture(scope="module")
def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


CLIENTS: list[Callable[[str], Any]] = [
    lambda url: urllib.request.urlopen(url, timeout=5),
    lambda url: httpx.get(url),
    lambda url: requests.get(url, timeout=5),
]


@pytest.mark.parametrize("ask", CLIENTS)
def test_a_connection_that_is_refused_may_pass(closed: str, ask: Callable[[str], Any]) -> None:
    assert may_pass(raised(lambda: ask(closed)))


@pytest.mark.parametrize("ask", CLIENTS)
def test_an_address_that_is_none_does_not_pass(ask: Callable[[str], Any]) -> None:
    assert not may_pass(raised(lambda: ask("nowhere://example")))


def httpx_error(status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "http://example"))
    return raised(response.raise_for_status)


def requests_error(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return raised(response.raise_for_status)


def urllib_error(status: int) -> Exception:
    return urllib.error.HTTPError("http://example", status, "said so", Message(), None)


class ApiStatusError(Exception):
    """As the clients of hosted models have it."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


@pytest.mark.parametrize("make", [httpx_error, requests_error, urllib_error, ApiStatusError])
def test_the_status_decides(make: Callable[[int], Exception]) -> None:
    answers = {
        status: may_pass(make(status)) for status in (400, 401, 403, 404, 408, 413, 422, 425, 429, 500, 501, 502, 503)
    }
    assert [status for status, passes in answers.items() if passes] == [408, 425, 429, 500, 502, 503]


class ServiceUnavailable(Exception):
    pass


class NetworkXError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), True),
        (OSError(24, "Too many open files"), True),
        (ServiceUnavailable(), True),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), True),
        (httpx.ReadTimeout("late"), True),
        (requests.exceptions.ChunkedEncodingError("broken off"), True),
        (ExceptionGroup("both", [TimeoutError(), ConnectionError()]), True),
        (ExceptionGroup("one", [TimeoutError(), KeyError("x")]), False),
        (KeyError("x"), False),
        (ValueError("x"), False),
        (ZeroDivisionError("x"), False),
        (MemoryError(), False),
        (NetworkXError(), False),
        (FileNotFoundError(2, "No such file"), False),
        (PermissionError(13, "Permission denied"), False),
        (OSError(28, "No space left on device"), False),
        (json.JSONDecodeError("no JSON", "", 0), False),
        (subprocess.TimeoutExpired("run_tests", 1.0), False),
        (ssl.SSLCertVerificationError("self-signed certificate"), False),
        (requests.exceptions.SSLError(ssl.SSLCertVerificationError("self-signed")), True),
    ],
    ids=repr,
)
def test_errors_of_their_own(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


def chained(first: Exception, then: Exception, *, how: str) -> Exception:
    def both() -> None:
        try:
            raise first
        except Exception as error:
            if how == "from":
                raise then from error
            if how == "from none":
                raise then from None
            raise then  # noqa: B904 (its context is what is tested)

    return raised(both)


@pytest.mark.parametrize(("how", "passes"), [("from", True), ("while", True), ("from none", False)])
def test_what_an_error_was_raised_because_of_counts(how: str, passes: bool) -> None:
    assert may_pass(chained(ConnectionError("refused"), RuntimeError("no score"), how=how)) is passes
    assert not may_pass(chained(KeyError("x"), RuntimeError("no score"), how=how))


def test_a_certificate_that_is_refused_stays_refused() -> None:
    assert not may_pass(chained(ssl.SSLCertVerificationError("self-signed"), httpx.ConnectError("no"), how="from"))


def test_an_error_that_is_its_own_cause_ends() -> None:
    error = RuntimeError("round")
    error.__cause__ = error
    assert not may_pass(error)
