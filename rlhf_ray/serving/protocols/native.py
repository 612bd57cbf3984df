"""This project's own ``POST /v1/reward``: items in any representation, and each with its own result or error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.bodies import field, is_ids, is_messages, kind
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored
from rlhf_ray.serving.refusals import Refusal


def read(body: Body) -> Asked:
    """The items of a body; one that is not well formed fails alone."""
    items = body.get("items")
    if not isinstance(items, list):
        raise Refusal("wrong_body", f"items must be a list, not {kind(items)}")
    model = field(body, "model", str, "") or None
    return Asked([_item(one) for one in items], _answer, model=model, tells_errors=True)


def _item(given: Any) -> ScoreRequest | ScoreResult:
    if not isinstance(given, dict):
        return ScoreResult.failed(f"an item must be a JSON object, not {kind(given)}")
    if not given.keys() <= _CHECKS.keys():
        return ScoreResult.failed(
            "unknown key: an item has token_ids, text, messages, or prompt and response; and it may have truncate, or "
            "with text add_special_tokens"
        )
    wrong = next((name for name, (_, right) in _CHECKS.items() if name in given and not right(given[name])), None)
    if wrong is not None:
        return ScoreResult.failed(f"{wrong} must be {_CHECKS[wrong][0]}")
    sequences = {name: tuple(given[name]) for name in ("token_ids", "messages") if name in given}
    try:
        return ScoreRequest(**{**given, **sequences})
    except RequestError as error:
        return ScoreResult.failed(str(error))


def _answer(scored: Scored) -> Any:
    return {
        "request_id": scored.request_id,
        "model": scored.model,
        "version": scored.version,
        "results": [vars(result) for result in scored.results],
    }


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "token_ids": ("a list of whole numbers", is_ids),
    "messages": ("a list of objects with the texts role and content", is_messages),
    "text": ("a text", _is_text),
    "prompt": ("a text", _is_text),
    "response": ("a text", _is_text),
    "truncate": ("true or false", _is_flag),
    "add_special_tokens": ("true or false", _is_flag),
}
_NUMBER = {"type": ["number", "null"]}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
}
_ITEM = {
    "type": "object",
    "properties": {
        "token_ids": {"type": "array", "items": {"type": "integer"}},
        "text": {"type": "string"},
        "messages": {"type": "array", "items": _MESSAGE},
        "prompt": {"type": "string"},
        "response": {"type": "string"},
        "truncate": {"type": "boolean", "default": False, "description": "cut an item that is too long from the left"},
        "add_special_tokens": {"type": "boolean", "default": False, "description": "of a text, as its tokenizer does"},
    },
    "description": "exactly one of token_ids, text, messages, or prompt with response",
}
_RESULT = {
    "type": "object",
    "required": ["raw", "reward", "tokens", "truncated", "error", "fault"],
    "properties": {
        "raw": {**_NUMBER, "description": "the model's output"},
        "reward": {**_NUMBER, "description": "normalised where the model's directory has a mean and a deviation"},
        "tokens": {"type": "integer"},
        "truncated": {"type": "boolean"},
        "error": {"type": ["string", "null"]},
        "fault": {"enum": ["item", "model", "source", None]},
    },
}
REWARD = Protocol(
    name="reward",
    paths=("/v1/reward",),
    summary="Scores of items in any representation; a bad item fails alone",
    read=read,
    request={
        "type": "object",
        "required": ["items"],
        "properties": {"items": {"type": "array", "items": _ITEM}, "model": {"type": "string"}},
        "example": {"items": [{"prompt": "why? ", "response": "because."}, {"token_ids": [1, 5, 6], "truncate": True}]},
    },
    response={
        "type": "object",
        "required": ["request_id", "model", "version", "results"],
        "properties": {
            "request_id": {"type": "string"},
            "model": {"type": "string"},
            "version": {"type": "string"},
            "results": {"type": "array", "items": _RESULT},
        },
    },
)
