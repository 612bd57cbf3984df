"""A body is read up to the limit; what is refused is said with the key and the kind of its value, never with its text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from starlette.requests import Request

from rlhf_ray.serving.bodies import BodyReader
from rlhf_ray.serving.refusals import Refusal


def reader(max_bytes: int = 1000, together: int = 10_000, timeout_s: float = 5.0) -> BodyReader:
    return BodyReader(max_bytes=max_bytes, max_bytes_together=together, timeout_s=timeout_s)


def read(content: bytes, max_bytes: int = 1000, chunk: int = 7) -> Mapping[str, Any]:
    chunks = iter([content[start : start + chunk] for start in range(0, len(content), chunk)] or [b""])
    return asyncio.run(reader(max_bytes).json(request_of(chunks)))


def request_of(chunks: Iterator[bytes], **headers: str) -> Request:
    async def receive() -> Mapping[str, Any]:
        chunk = next(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": pairs}, receive)


@pytest.mark.parametrize("body", [{}, {"a": 1}, {"query": ["ä" * 50, ""]}, {"a": {"b": [None, 1.5, True]}}], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_json_object_is_read_whatever_its_chunks(body: dict[str, Any], chunk: int) -> None:
    assert read(json.dumps(body, ensure_ascii=False).encode(), chunk=chunk) == body


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        *((content, "not_json") for content in (b"", b"{", b"\xff\xfe", b'{"a": 1} x', b"9" * 5000)),
        *((b'{"a": [%s]}' % name, "not_json") for name in (b"NaN", b"Infinity", b"-Infinity")),
        (b"[" * 100_000, "too_deep"),
        (b'{"a":' * 100_000, "too_deep"),
    ],
)
def test_what_is_no_json_is_refused(content: bytes, kind: str) -> None:
    with pytest.raises(Refusal) as caught:
        read(content, max_bytes=10**6, chunk=10**6)
    assert (caught.value.status, caught.value.kind) == (400, kind)


@pytest.mark.parametrize(("content", "kind"), [(b"[]", "list"), (b'"a"', "str"), (b"null", "nothing"), (b"1", "int")])
def test_what_is_no_object_is_refused(content: bytes, kind: str) -> None:
    with pytest.raises(Refusal, match=f"must be a JSON object, not {kind}") as caught:
        read(content)
    assert caught.value.status == 422


def test_a_body_is_read_only_up_to_the_limit() -> None:
    assert read(b'{"a": 12345}', max_bytes=12) == {"a": 12345}
    endless = iter(lambda: b"x" * 10, b"never")
    with pytest.raises(Refusal, match="larger than 100 bytes") as caught:
        asyncio.run(reader(100).json(request_of(endless)))
    assert caught.value.status == 413


def test_a_told_length_beyond_the_limit_is_refused_before_anything_is_read() -> None:
    with (
        pytest.raises(Refusal, match="larger than 100 bytes"),
        reader(100).reserving(request_of(iter([]), content_length="101")),
    ):
        pytest.fail("it was let in")


def test_bytes_of_all_requests_together_are_bounded_and_given_back() -> None:
    bodies = reader(max_bytes=100, together=250)
    with bodies.reserving(request_of(iter([]), content_length="100")), bodies.reserving(request_of(iter([]))):
        assert bodies.held == 200, "one that does not tell its length may send as much as any"
        with pytest.raises(Refusal) as caught, bodies.reserving(request_of(iter([]), content_length="51")):
            pytest.fail("it was let in")
        assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
        with bodies.reserving(request_of(iter([]), content_length="50")):
            assert bodies.held == 250
    assert bodies.held == 0


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def receive() -> Mapping[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(Refusal, match=r"within 0\.05 s") as caught:
        asyncio.run(reader(timeout_s=0.05).json(request))
    assert caught.value.status == 408


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP, identity"])
def test_a_compressed_body_is_refused_unread(encoding: str) -> None:
    with pytest.raises(Refusal, match="compressed") as caught:
        asyncio.run(reader().json(request_of(iter([b"x"]), content_encoding=encoding)))
    assert caught.value.status == 415
