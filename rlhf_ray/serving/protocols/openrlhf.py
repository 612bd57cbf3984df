"""OpenRLHF's ``POST /get_reward``, in every generation of its body.

``query`` holds whole texts with their special tokens in them, as the policy's tokenizer decoded them. What comes beside
it (``prompts``; ``labels`` or ``metadata``) is for reward functions and is not read.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.serving.bodies import item, kind, text_of
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored
from rlhf_ray.serving.refusals import Refusal


def read(body: Body) -> Asked:
    """The items of a body, of whichever generation."""
    queries = body.get("query")
    if not isinstance(queries, list):
        raise Refusal("wrong_body", f"query must be a list of texts, not {kind(queries)}")
    names = [f"query {position}" for position in range(len(queries))]
    items = [item(name, text=text_of(query, name)) for name, query in zip(names, queries, strict=True)]
    return Asked(items, _answer)


def _answer(scored: Scored) -> Any:
    rewards = scored.numbers()
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


_NUMBERS = {"type": "array", "items": {"type": "number"}}
GET_REWARD = Protocol(
    name="openrlhf",
    paths=("/get_reward",),
    summary="Scores of whole texts, as OpenRLHF's remote reward model answers them",
    read=read,
    request={
        "type": "object",
        "required": ["query"],
        "properties": {
            "query": {"type": "array", "items": {"type": "string"}, "description": "texts with their special tokens"},
            "prompts": {"description": "not read"},
            "labels": {"description": "not read"},
            "metadata": {"description": "not read"},
        },
        "example": {"query": ["<bos>why? because.<eos>"], "prompts": ["<bos>why?"], "labels": [None]},
    },
    response={
        "type": "object",
        "required": ["rewards", "scores", "extra_logs"],
        "properties": {"rewards": _NUMBERS, "scores": _NUMBERS, "extra_logs": {"type": "object"}},
    },
)
