"""The inputs that vLLM's, SGLang's and OpenAI's interfaces have in common.

``input`` is a text, a list of texts, token ids or a list of lists of token ids; or ``messages`` is a conversation. As
there, a text gets the special tokens of the reward model's tokenizer (never a second time, where it begins or ends with
them) unless ``add_special_tokens`` is false; ids are scored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.bodies import field, is_ids, item, kind, messages_of, refuse_unserved
from rlhf_ray.serving.protocol import Body
from rlhf_ray.serving.refusals import Refusal

ACTIVATION_KEYS = ("use_activation", "activation", "softmax")
UNSERVED: Mapping[str, str] = {
    "chat_template": "the reward model's own template is used",
    "chat_template_kwargs": "the reward model's own template is used as it stands",
    "add_generation_prompt": "a conversation is scored at its last answer",
    "continue_final_message": "a conversation is scored at its last answer",
    "mm_processor_kwargs": "there is text only",
    "normalize": "set normalize where the service is started",
}

TEXT_OR_IDS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ],
    "description": "a text, texts, token ids, or lists of token ids",
}
MESSAGES = {"type": "array", "items": {"type": "object"}, "description": "a conversation, instead of input"}
COMMON = {
    "model": {"type": "string"},
    "use_activation": {"type": "boolean", "description": "apply the sigmoid; raw scores by default"},
    "activation": {"type": "boolean", "description": "an older name of use_activation"},
    "softmax": {"type": "boolean", "description": "an older name of use_activation"},
    "truncate_prompt_tokens": {"enum": [-1, None], "description": "-1 cuts what is too long from the left"},
    "add_special_tokens": {"type": "boolean", "default": True},
    "request_id": {"type": "string"},
}


def inputs(body: Body) -> list[ScoreRequest]:
    """The items of ``input`` or ``messages``."""
    refuse_unserved(body, UNSERVED)
    truncate = truncation(body)
    if "messages" in body:
        if body.get("input") is not None:
            raise Refusal("wrong_body", "give input or messages, not both")
        return [item("messages", messages=messages_of(body["messages"]), truncate=truncate)]
    given = body.get("input")
    add = field(body, "add_special_tokens", bool, True)
    if isinstance(given, str):
        return [item("input", text=given, truncate=truncate, add_special_tokens=add)]
    if not isinstance(given, list):
        raise Refusal("wrong_body", f"input must be a text, texts, token ids or lists of them, not {kind(given)}")
    if given and is_ids(given):
        return [item("input", token_ids=tuple(given), truncate=truncate)]
    return [_one(f"input {position}", value, truncate, add) for position, value in enumerate(given)]


def _one(name: str, value: Any, truncate: bool, add: bool) -> ScoreRequest:
    if isinstance(value, str):
        return item(name, text=value, truncate=truncate, add_special_tokens=add)
    if is_ids(value):
        return item(name, token_ids=tuple(value), truncate=truncate)
    raise Refusal("wrong_body", f"{name} must be a text or token ids, not {kind(value)}")


def activation(body: Body) -> bool:
    """Whether the sigmoid is asked for, under any of the names it had; raw scores where nothing is said."""
    said = {name: field(body, name, bool, False) for name in ACTIVATION_KEYS if body.get(name) is not None}
    if len(set(said.values())) > 1:
        raise Refusal("wrong_body", f"{' and '.join(said)} say different things: keep one")
    return any(said.values())


def truncation(body: Body) -> bool:
    """Whether an item that is too long is to be cut from the left."""
    limit = field(body, "truncate_prompt_tokens", int, 0)
    side = field(body, "truncation_side", str, "left")
    if body.get("truncate_prompt_tokens") is not None and limit != -1:
        raise Refusal("unsupported", "truncate_prompt_tokens is served as -1 only: cut at the model's limit")
    if limit and side != "left":
        raise Refusal("unsupported", "truncation_side is served as left only: the score is read at the last token")
    return limit == -1


def model_of(body: Body) -> str | None:
    """The model that a body names."""
    return field(body, "model", str, "") or None


def request_id_of(body: Body) -> str | None:
    """The identity that a body gives its request."""
    return field(body, "request_id", str, "") or None
