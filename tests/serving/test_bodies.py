"""A body is read up to the limit; what is refused is said with the key and the kind of its value, never with its text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from starlette.requests import Request

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.bodies import BodyError, openrlhf_requests, read_json, reward_requests

SECRET = "my-secret-text"


def read(content: bytes, max_bytes: int = 1000, chunk: int = 7) -> Mapping[str, Any]:
    chunks = iter([content[start : start + chunk] for start in range(0, len(content), chunk)] or [b""])
    return asyncio.run(read_json(request_of(chunks), max_bytes))


def request_of(chunks: Iterator[bytes]) -> Request:
    async def receive() -> Mapping[str, Any]:
        chunk = next(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@pytest.mark.parametrize("body", [{}, {"a": 1}, {"query": ["ä" * 50, ""]}, {"a": {"b": [None, 1.5, True]}}], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_json_object_is_read_whatever_its_chunks(body: dict[str, Any], chunk: int) -> None:
    assert read(json.dumps(body, ensure_ascii=False).encode(), chunk=chunk) == body


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} x', b"9" * 5000])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(BodyError) as caught:
        read(content, max_bytes=10**6, chunk=10**6)
    assert (caught.value.status, str(caught.value)) == (400, "the body is not JSON")


@pytest.mark.parametrize(("content", "kind"), [(b"[]", "list"), (b'"a"', "str"), (b"null", "NoneType"), (b"1", "int")])
def test_what_is_no_object_is_refused(content: bytes, kind: str) -> None:
    with pytest.raises(BodyError, match=f"must be a JSON object, not {kind}") as caught:
        read(content)
    assert caught.value.status == 422


def test_a_body_is_read_only_up_to_the_limit() -> None:
    assert read(b'{"a": 12345}', max_bytes=12) == {"a": 12345}
    endless = iter(lambda: b"x" * 10, b"never")
    with pytest.raises(BodyError, match="larger than 100 bytes") as caught:
        asyncio.run(read_json(request_of(endless), 100))
    assert caught.value.status == 413


GENERATIONS = [
    {"query": ["a", "b"]},
    {"query": ["a", "b"], "prompts": ["a", ""], "metadata": [{}, {}]},
    {"query": ["a", "b"], "prompts": ["a", ""], "labels": ["x", None]},
]


@pytest.mark.parametrize("body", GENERATIONS)
def test_every_generation_of_openrlhfs_body_is_read(body: dict[str, Any]) -> None:
    assert openrlhf_requests(body) == [ScoreRequest(text="a"), ScoreRequest(text="b")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "query must be a list of texts, not nothing"),
        ({"query": SECRET}, "query must be a list of texts, not str"),
        ({"query": ["a", 1]}, "query 1 must be a text, not int"),
        ({"query": ["a", None]}, "query 1 must be a text, not nothing"),
        ({"query": [f"{SECRET}\ud800"]}, "query 0: text holds half of a surrogate pair"),
    ],
)
def test_another_query_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(BodyError, match=message) as caught:
        openrlhf_requests(body)
    assert caught.value.status == 422
    assert SECRET not in str(caught.value)


def test_items_are_read_in_every_representation() -> None:
    turns = [{"role": "user", "content": "a"}]
    items = [
        {"token_ids": [1, 2]}, {"text": " a ", "truncate": True}, {"messages": turns}, {"prompt": "a", "response": "b"},
    ]  # fmt: skip
    assert reward_requests({"items": items}) == [
        ScoreRequest(token_ids=(1, 2)),
        ScoreRequest(text=" a ", truncate=True),
        ScoreRequest(messages=tuple(turns)),
        ScoreRequest(prompt="a", response="b"),
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (SECRET, "an item must be a JSON object, not str"),
        ({SECRET: 1}, "unknown key: an item has token_ids, text, messages, or prompt and response"),
        ({"text": SECRET, "txt": SECRET}, "unknown key"),
        ({"text": None}, "text must be a text"),
        ({"text": [SECRET]}, "text must be a text"),
        ({"token_ids": [1.0]}, "token_ids must be a list of whole numbers"),
        ({"token_ids": [True]}, "token_ids must be"),
        ({"token_ids": "12"}, "token_ids must be"),
        ({"messages": [SECRET]}, "messages must be a list of objects with the texts role and content"),
        ({"messages": [{"role": "user", "content": [SECRET]}]}, "messages must be"),
        ({"messages": [{"content": SECRET}]}, "messages must be"),
        ({"text": SECRET, "truncate": 1}, "truncate must be true or false"),
        ({"prompt": SECRET}, "prompt and response go together"),
        ({"text": SECRET, "token_ids": [1]}, "give exactly one of"),
        ({}, "found nothing"),
        ({"text": f"{SECRET}\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_bad_item_is_told_what_is_wrong_and_fails_alone(item: Any, message: str) -> None:
    before, error, after = reward_requests({"items": [{"text": "a"}, item, {"text": "b"}]})
    assert (before, after) == (ScoreRequest(text="a"), ScoreRequest(text="b"))
    assert isinstance(error, str) and message in error
    assert SECRET not in error


@pytest.mark.parametrize(("body", "kind"), [({}, "nothing"), ({"items": {"text": "a"}}, "dict")])
def test_items_must_be_a_list(body: dict[str, Any], kind: str) -> None:
    with pytest.raises(BodyError, match=f"items must be a list, not {kind}"):
        reward_requests(body)
