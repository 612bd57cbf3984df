"""Request bodies as JSON, and what is wrong with them.

Always true: a body is read only up to the limit; what is refused is said with the key and the value's type, never with its
text, which stays out of answers and logs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest


class BodyError(RequestError):
    """A body that cannot be served; ``status`` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_json(request: Request, max_bytes: int) -> Mapping[str, Any]:
    """The JSON object of a request's body."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise BodyError(413, f"the body is larger than {max_bytes} bytes: send fewer items")
    try:
        body = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise BodyError(400, "the body is not JSON") from error
    if not isinstance(body, dict):
        raise BodyError(422, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def openrlhf_requests(body: Mapping[str, Any]) -> list[ScoreRequest]:
    """The items of an OpenRLHF body: ``query`` is texts that hold their special tokens already."""
    queries = body.get("query")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise BodyError(422, f"query must be a list of texts, not {_kind(queries)}")
    return [ScoreRequest(text=query) for query in queries]


def reward_requests(body: Mapping[str, Any]) -> list[ScoreRequest | str]:
    """The items of a ``/v1/reward`` body; an item that is not well formed is the text of its error."""
    items = body.get("items")
    if not isinstance(items, list):
        raise BodyError(422, f"items must be a list, not {_kind(items)}")
    return [_reward_request(item) for item in items]


def _reward_request(item: Any) -> ScoreRequest | str:
    if not isinstance(item, dict):
        return f"an item must be a JSON object, not {_kind(item)}"
    unknown = sorted(set(item) - {"token_ids", "text", "messages", "prompt", "response", "truncate"})
    if unknown:
        return (
            f"unknown key {unknown[0]!r}: an item has token_ids, text, messages, or prompt and response; and truncate"
        )
    wrong = next((name for name, check in _CHECKS.items() if name in item and not check(item[name])), None)
    if wrong is not None:
        return f"{wrong} has the wrong type: {_kind(item[wrong])}"
    sequences = {name: tuple(item[name]) for name in ("token_ids", "messages") if name in item}
    try:
        return ScoreRequest(**{**item, **sequences})
    except RequestError as error:
        return str(error)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


_CHECKS = {
    "token_ids": _is_ids,
    "messages": _is_messages,
    "text": lambda value: isinstance(value, str),
    "prompt": lambda value: isinstance(value, str),
    "response": lambda value: isinstance(value, str),
    "truncate": lambda value: isinstance(value, bool),
}


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
