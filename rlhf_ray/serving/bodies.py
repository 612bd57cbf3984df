"""Request bodies as JSON, and what is wrong with them.

Always true: a body is read only up to the limit; what is refused is said with the key and the value's type, never with its
text, which stays out of answers and logs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    """The items of an OpenRLHF body, of whichever generation: ``query`` is texts with their special tokens in them.

    What comes beside it (``prompts``, ``labels``, ``metadata``) is for reward functions and is not read.
    """
    queries = body.get("query")
    if not isinstance(queries, list):
        raise BodyError(422, f"query must be a list of texts, not {_kind(queries)}")
    requests = []
    for position, query in enumerate(queries):
        if not isinstance(query, str):
            raise BodyError(422, f"query {position} must be a text, not {_kind(query)}")
        try:
            requests.append(ScoreRequest(text=query))
        except RequestError as error:
            raise BodyError(422, f"query {position}: {error}") from error
    return requests


def reward_requests(body: Mapping[str, Any]) -> list[ScoreRequest | str]:
    """The items of a ``/v1/reward`` body; an item that is not well formed is the text of its error."""
    items = body.get("items")
    if not isinstance(items, list):
        raise BodyError(422, f"items must be a list, not {_kind(items)}")
    return [_reward_request(item) for item in items]


def _reward_request(item: Any) -> ScoreRequest | str:
    if not isinstance(item, dict):
        return f"an item must be a JSON object, not {_kind(item)}"
    if not item.keys() <= _CHECKS.keys():
        return "unknown key: an item has token_ids, text, messages, or prompt and response; and it may have truncate"
    wrong = next((name for name, (_, right) in _CHECKS.items() if name in item and not right(item[name])), None)
    if wrong is not None:
        return f"{wrong} must be {_CHECKS[wrong][0]}"
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


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "token_ids": ("a list of whole numbers", _is_ids),
    "messages": ("a list of objects with the texts role and content", _is_messages),
    "text": ("a text", _is_text),
    "prompt": ("a text", _is_text),
    "response": ("a text", _is_text),
    "truncate": ("true or false", lambda value: isinstance(value, bool)),
}


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
