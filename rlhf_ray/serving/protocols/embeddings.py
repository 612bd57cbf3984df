"""OpenAI's ``POST /v1/embeddings`` with the score as an embedding of one number: verl with SGLang, and openai's client."""

from __future__ import annotations

from typing import Any

from rlhf_ray.serving.bodies import field
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored
from rlhf_ray.serving.protocols.classify import ENCODING, listing, listing_schema, number_writer
from rlhf_ray.serving.protocols.inputs import COMMON, MESSAGES, TEXT_OR_IDS, activation, inputs, model_of, request_id_of
from rlhf_ray.serving.refusals import Refusal, as_openai


def read(body: Body) -> Asked:
    """The items of a body."""
    if field(body, "dimensions", int, 1) != 1:
        raise Refusal("unsupported", "dimensions is served as 1 only: the score is the whole embedding")
    squashed, write = activation(body), number_writer(body)

    def answer(scored: Scored) -> Any:
        rows = enumerate(scored.numbers(activation=squashed))
        listed = [{"index": index, "object": "embedding", "embedding": write(score)} for index, score in rows]
        return listing("embd", scored, listed)

    return Asked(inputs(body), answer, model=model_of(body), request_id=request_id_of(body))


EMBEDDINGS = Protocol(
    name="embeddings",
    paths=("/v1/embeddings",),
    summary="Scores as embeddings of one number",
    read=read,
    request={
        "type": "object",
        "properties": {
            "input": TEXT_OR_IDS,
            "messages": MESSAGES,
            **COMMON,
            **ENCODING,
            "dimensions": {"enum": [1, None]},
        },
        "example": {"input": "why? because.", "model": "reward", "encoding_format": "float"},
    },
    response=listing_schema(
        {
            "index": {"type": "integer"},
            "object": {"type": "string"},
            "embedding": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
        }
    ),
    refuse=as_openai,
)
