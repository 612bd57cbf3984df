"""OpenAI's ``POST /v1/embeddings`` with the score as an embedding of one number: verl with SGLang, and openai's client."""

from __future__ import annotations

from typing import Annotated, ClassVar

from typing_extensions import TypedDict

from rlhf_ray.serving.protocols.classify import EncodedBody, WrittenScore
from rlhf_ray.serving.protocols.fields import Only
from rlhf_ray.serving.protocols.inputs import Listing, listing
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import as_openai


class Embedded(TypedDict):
    """One item of an answer."""

    index: int
    object: str
    embedding: WrittenScore


class EmbeddingsBody(EncodedBody):
    """The body of ``/v1/embeddings``."""

    dimensions: Annotated[int, Only((1,), "is served as 1 only: the score is the whole embedding")] | None = None
    example: ClassVar = {"input": "why? because.", "model": "reward", "encoding_format": "float"}

    def parse(self) -> ParsedRequest:
        sigmoid, write = self.applies_sigmoid(), self.writer()

        def answer(scored: ScoredRequest) -> Listing[Embedded]:
            scores = enumerate(scored.numbers(activation=sigmoid))
            rows: list[Embedded] = [
                {"index": index, "object": "embedding", "embedding": write(score)} for index, score in scores
            ]
            return listing("embd", scored, rows)

        return self.request(self.items(), answer)


EMBEDDINGS = Protocol(
    name="embeddings",
    paths=("/v1/embeddings",),
    summary="Scores as embeddings of one number",
    bodies=(EmbeddingsBody,),
    answer=Listing[Embedded],
    refuse=as_openai,
)
