"""vLLM's ``/classify`` (verl asks it, and SGLang's clients) and ``/pooling``.

The score is the only class: raw unless the activation is asked for, under any of its names.
"""

from __future__ import annotations

import base64
import struct
import sys
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from typing_extensions import TypedDict

from rlhf_ray.serving.protocols.fields import Only
from rlhf_ray.serving.protocols.inputs import InputBody, Listing, listing
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import as_openai

LABEL = "LABEL_0"
"""What transformers calls the only class."""
WrittenScore = list[float] | str


class Classified(TypedDict):
    """One item of an answer of ``/classify``."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyBody(InputBody):
    """The body of ``/classify``."""

    example: ClassVar = {"input": ["why? because."], "use_activation": False}

    def parse(self) -> ParsedRequest:
        sigmoid = self.applies_sigmoid()

        def answer(scored: ScoredRequest) -> Listing[Classified]:
            scores = enumerate(scored.numbers(activation=sigmoid))
            rows: list[Classified] = [
                {"index": index, "label": LABEL, "probs": [score], "num_classes": 1} for index, score in scores
            ]
            return listing("classify", scored, rows)

        return self.request(self.items(), answer)


class EncodedBody(InputBody):
    """A body that says how the vector of one score is written."""

    encoding_format: Annotated[str, Only(("float", "base64"), "is served as float and base64")] | None = None
    endianness: Annotated[Literal["native", "little", "big"] | None, Field(title="native, little or big")] = None

    def writer(self) -> Callable[[float], WrittenScore]:
        """Writes a score as a list of one number, or as base64 of its float32 bytes."""
        if self.encoding_format != "base64":
            return lambda score: [score]
        order = sys.byteorder if self.endianness == "native" else self.endianness
        form = ">f" if order == "big" else "<f"
        return lambda score: base64.b64encode(struct.pack(form, score)).decode()


class Pooled(TypedDict):
    """One item of an answer of ``/pooling``."""

    index: int
    object: str
    data: WrittenScore


class PoolingBody(EncodedBody):
    """The body of ``/pooling``."""

    task: Annotated[str, Only(("classify",), "is served as classify only: one score a sequence")] | None = None
    embed_dtype: Annotated[str, Only(("float32",), "is served as float32 only")] | None = None
    example: ClassVar = {"input": [[1, 5, 6]], "encoding_format": "base64"}

    def parse(self) -> ParsedRequest:
        sigmoid, write = self.applies_sigmoid(), self.writer()

        def answer(scored: ScoredRequest) -> Listing[Pooled]:
            scores = enumerate(scored.numbers(activation=sigmoid))
            rows: list[Pooled] = [
                {"index": index, "object": "pooling", "data": write(score)} for index, score in scores
            ]
            return listing("pool", scored, rows)

        return self.request(self.items(), answer)


CLASSIFY = Protocol(
    name="classify",
    paths=("/classify", "/v1/classify"),
    summary="Scores as vLLM's and SGLang's classify answers them; raw unless the activation is asked for",
    bodies=(ClassifyBody,),
    answer=Listing[Classified],
    refuse=as_openai,
)
POOLING = Protocol(
    name="pooling",
    paths=("/pooling",),
    summary="Scores as vLLM's pooling answers them for reward models",
    bodies=(PoolingBody,),
    answer=Listing[Pooled],
    refuse=as_openai,
)
