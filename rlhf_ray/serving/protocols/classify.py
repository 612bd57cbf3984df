"""vLLM's ``/classify`` (verl asks it, and SGLang's clients) and ``/pooling``.

The score is the only class: raw unless the activation is asked for, under any of its names.
"""

from __future__ import annotations

import base64
import struct
import sys
from typing import Any

from rlhf_ray.serving.bodies import field
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored
from rlhf_ray.serving.protocols.inputs import COMMON, MESSAGES, TEXT_OR_IDS, activation, inputs, model_of, request_id_of
from rlhf_ray.serving.refusals import Refusal, as_openai

LABEL = "LABEL_0"
"""What transformers calls the only class."""


def read_classify(body: Body) -> Asked:
    """The items of a ``/classify`` body."""
    squashed = activation(body)

    def answer(scored: Scored) -> Any:
        rows = enumerate(scored.numbers(activation=squashed))
        listed = [{"index": index, "label": LABEL, "probs": [score], "num_classes": 1} for index, score in rows]
        return listing("classify", scored, listed)

    return Asked(inputs(body), answer, model=model_of(body), request_id=request_id_of(body))


def read_pooling(body: Body) -> Asked:
    """The items of a ``/pooling`` body."""
    task = field(body, "task", str, "classify")
    if task != "classify":
        raise Refusal("unsupported", "task is served as classify only: one score a sequence")
    dtype = field(body, "embed_dtype", str, "float32")
    if dtype != "float32":
        raise Refusal("unsupported", "embed_dtype is served as float32 only")
    squashed, write = activation(body), number_writer(body)

    def answer(scored: Scored) -> Any:
        rows = enumerate(scored.numbers(activation=squashed))
        return listing(
            "pool", scored, [{"index": index, "object": "pooling", "data": write(score)} for index, score in rows]
        )

    return Asked(inputs(body), answer, model=model_of(body), request_id=request_id_of(body))


def number_writer(body: Body) -> Any:
    """How a vector of one number is written: as a list, or as base64 of its float32 bytes."""
    form = field(body, "encoding_format", str, "float")
    order = field(body, "endianness", str, "little")
    if form not in ("float", "base64"):
        raise Refusal("unsupported", "encoding_format is served as float and base64")
    if order not in ("native", "little", "big"):
        raise Refusal("wrong_body", "endianness must be native, little or big")
    if form == "float":
        return lambda score: [score]
    big = (sys.byteorder if order == "native" else order) == "big"
    return lambda score: base64.b64encode(struct.pack(">f" if big else "<f", score)).decode()


def listing(prefix: str, scored: Scored, rows: list[Any]) -> dict[str, Any]:
    """An answer of OpenAI's shape."""
    return {
        "id": f"{prefix}-{scored.request_id}",
        "object": "list",
        "created": scored.created,
        "model": scored.model,
        "data": rows,
        "usage": scored.usage,
    }


def listing_schema(row: dict[str, Any]) -> dict[str, Any]:
    """The schema of :func:`listing`."""
    required = ["id", "object", "created", "model", "data", "usage"]
    rows = {"type": "array", "items": {"type": "object", "required": list(row), "properties": row}}
    kinds = {"id": "string", "object": "string", "created": "integer", "model": "string", "usage": "object"}
    return {
        "type": "object",
        "required": required,
        "properties": {**{name: {"type": kind} for name, kind in kinds.items()}, "data": rows},
    }


_REQUEST = {"type": "object", "properties": {"input": TEXT_OR_IDS, "messages": MESSAGES, **COMMON}}
_NUMBERS = {"type": "array", "items": {"type": "number"}}
CLASSIFY = Protocol(
    name="classify",
    paths=("/classify", "/v1/classify"),
    summary="Scores as vLLM's and SGLang's classify answers them; raw unless the activation is asked for",
    read=read_classify,
    request={**_REQUEST, "example": {"input": ["why? because."], "use_activation": False}},
    response=listing_schema(
        {
            "index": {"type": "integer"},
            "label": {"type": "string"},
            "probs": _NUMBERS,
            "num_classes": {"type": "integer"},
        }
    ),
    refuse=as_openai,
)
ENCODING = {
    "encoding_format": {"enum": ["float", "base64", None]},
    "endianness": {"enum": ["native", "little", "big", None]},
}
POOLING = Protocol(
    name="pooling",
    paths=("/pooling",),
    summary="Scores as vLLM's pooling answers them for reward models",
    read=read_pooling,
    request={
        "type": "object",
        "properties": {
            **_REQUEST["properties"],
            **ENCODING,
            "task": {"enum": ["classify", None]},
            "embed_dtype": {"enum": ["float32", None]},
        },
        "example": {"input": [[1, 5, 6]], "encoding_format": "base64"},
    },
    response=listing_schema(
        {"index": {"type": "integer"}, "object": {"type": "string"}, "data": {"anyOf": [_NUMBERS, {"type": "string"}]}}
    ),
    refuse=as_openai,
)
