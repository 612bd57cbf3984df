"""A body is read up to the limit; what is refused is said with the key and the kind of its value, never with its text."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from starlette.requests import Request

from rlhf_ray.serving.bodies import BodyReader
from rlhf_ray.serving.refusals import Refusal


def reader(max_bytes: int = 1000, together: int = 100_000_000, timeout_s: float = 5.0) -> BodyReader:
    return BodyReader(max_bytes=max_bytes, max_bytes_together=together, timeout_s=timeout_s)


def read(content: bytes, max_bytes: int = 1000, chunk: int = 7) -> Mapping[str, Any]:
    chunks = iter([content[start : start + chunk] for start in range(0, len(content), chunk)] or [b""])
    return ask(reader(max_bytes), request_of(chunks))


def ask(bodies: BodyReader, request: Request, caller: str = "a") -> Mapping[str, Any]:
    """The object that a request's body is."""

    async def run() -> Mapping[str, Any]:
        with bodies.reserving(request, caller) as body:
            return await body.read(lambda values: values)

    try:
        return asyncio.run(run())
    finally:
        assert bodies.held == 0, "it is given back, whatever comes of it"


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
        ask(reader(100), request_of(endless))
    assert caught.value.status == 413


def test_a_told_length_beyond_the_limit_is_refused_before_anything_is_read() -> None:
    with (
        pytest.raises(Refusal, match="larger than 100 bytes"),
        reader(100).reserving(request_of(iter([]), content_length="101"), "a"),
    ):
        pytest.fail("it was let in")


TEXTS = b'{"a": ["%s"]}'


def test_memory_of_all_bodies_together_is_bounded_shared_and_given_back() -> None:
    bodies = reader(max_bytes=1000, together=8000)

    async def held(caller: str, letters: int, over: asyncio.Event) -> int:
        with bodies.reserving(request_of(iter([TEXTS % (b"x" * letters)])), caller) as body:
            await body.read(lambda values: values)
            await over.wait()
        return letters

    async def run() -> None:
        over = asyncio.Event()
        greedy = [asyncio.create_task(held("greedy", 500, over)) for _ in range(20)]
        await asyncio.sleep(0.05)
        refused = [one.exception() for one in greedy if one.done()]
        assert refused and all(isinstance(one, Refusal) and one.kind == "overloaded" for one in refused)
        assert 2000 < bodies.held <= 4000, "half of all at most"
        others = [asyncio.create_task(held(caller, 500, over)) for caller in ("b", "c")]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in others), "what one caller holds costs no other its place"
        over.set()
        await asyncio.gather(*others)

    asyncio.run(run())
    assert bodies.held == 0


def test_a_request_that_sends_nothing_holds_nothing() -> None:
    bodies = reader(max_bytes=1000, together=2000)

    async def run() -> None:
        silent = [asyncio.create_task(hold(bodies)) for _ in range(33)]
        await asyncio.sleep(0.05)
        assert bodies.held == 0 and not any(one.done() for one in silent)
        for one in silent:
            one.cancel()

    asyncio.run(run())


async def hold(bodies: BodyReader) -> None:
    async def receive() -> Mapping[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    request = Request({"type": "http", "method": "POST", "headers": [(b"transfer-encoding", b"chunked")]}, receive)
    with bodies.reserving(request, "silent") as body:
        await body.read(lambda values: values)


@pytest.mark.parametrize(
    ("content", "beside"),
    [
        (b'{"query": ["a"]}', False),
        (TEXTS % (b"x" * 100_000), True),
        (b'{"items": [%s 1]}' % (b'{"text":"a"},' * 1000), True),
    ],
    ids=["small", "large", "many items"],
)
def test_a_body_that_takes_long_to_read_is_read_beside_the_event_loop(content: bytes, beside: bool) -> None:
    async def run() -> str:
        with reader(max_bytes=1_000_000).reserving(request_of(iter([content])), "a") as body:
            return await body.read(lambda _: threading.current_thread().name)

    assert asyncio.run(run()).startswith("body reader") is beside


def test_large_bodies_of_one_caller_do_not_keep_another_waiting() -> None:
    bodies = reader(max_bytes=1_000_000)
    may, content = threading.Event(), TEXTS % (b"x" * 100_000)

    async def held(caller: str, read: Any) -> Any:
        with bodies.reserving(request_of(iter([content])), caller) as body:
            return await body.read(read)

    async def run() -> None:
        greedy = [asyncio.create_task(held("greedy", lambda _: may.wait(10))) for _ in range(8)]
        await asyncio.sleep(0.05)
        other = asyncio.create_task(held("other", lambda _: 1))
        done, _ = await asyncio.wait({other}, timeout=2)
        may.set()
        await asyncio.gather(*greedy)
        assert done, "it waits behind all of them"

    asyncio.run(run())


WIDE = {
    "lists": b'{"items": [%s 1]}' % (b"[]," * 1_500_000),
    "objects": b'{"items": [{"text": "a", "x": [%s 1]}]}' % (b'{"a":{}},' * 500_000),
    "texts": b'{"messages": [%s 1]}' % (b'"ab",' * 900_000),
}


@pytest.mark.parametrize("kind", WIDE)
def test_a_body_of_too_many_parts_is_refused_before_anything_is_built(kind: str) -> None:
    bodies = BodyReader(max_bytes=8_000_000, max_bytes_together=256_000_000, timeout_s=30)
    chunks = iter([WIDE[kind][start : start + 65536] for start in range(0, len(WIDE[kind]), 65536)])
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="texts, lists and objects") as caught:
            ask(bodies, request_of(chunks))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == 413
    assert peak < 20_000_000 and next(chunks, None) is not None, "the rest was not read"


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def receive() -> Mapping[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(Refusal, match=r"within 0\.05 s") as caught:
        ask(reader(timeout_s=0.05), request)
    assert caught.value.status == 408


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP, identity"])
def test_a_compressed_body_is_refused_unread(encoding: str) -> None:
    with pytest.raises(Refusal, match="compressed") as caught:
        ask(reader(), request_of(iter([b"x"]), content_encoding=encoding))
    assert caught.value.status == 415
