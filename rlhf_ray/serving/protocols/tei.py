"""text-embeddings-inference's ``/predict`` and ``/rerank``.

A pair is a prompt and its response. Scores are raw unless ``raw_scores`` is false; an item is cut only where ``truncate``
asks for it, and from the left only: the score is read at the last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from pydantic import AfterValidator, Field, Tag
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.protocols.fields import (
    AsList,
    AsPair,
    AsText,
    Body,
    JsonList,
    make_item,
    one_of,
    refuse_repetition,
)
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import Refusal, as_tei

LABEL = "LABEL_0"
INPUTS = "a text, a pair of texts, or a list of such lists"


def _one_or_two(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(texts) <= 2:
        raise PydanticCustomError(
            "wrong_body", "must be one text or a pair, not {count} of them", {"count": len(texts)}
        )
    return texts


OneOrTwo = Annotated[
    tuple[str, ...], JsonList(), AfterValidator(_one_or_two), Field(json_schema_extra={"minItems": 1, "maxItems": 2})
]


def _branch(value: Any) -> Tag | None:
    if isinstance(value, list):
        return AsList if all(isinstance(one, list) for one in value) else AsPair
    return AsText if isinstance(value, str) else None


class Prediction(TypedDict):
    """The only class of an item and its score."""

    score: float
    label: str


class Ranked(TypedDict):
    """One text of an answer of ``/rerank``; ``index`` is its position in the body."""

    index: int
    score: float
    text: NotRequired[str]


class TeiBody(Body):
    """What both bodies may say."""

    raw_scores: Annotated[bool | None, Field(description="false applies the sigmoid; true by default")] = None
    truncate: Annotated[bool | None, Field(description="cut an item that is too long from the left")] = None
    truncation_direction: Annotated[str | None, Field(description="left, where truncation is asked for")] = None

    def truncates(self) -> bool:
        """Whether an item that is too long is to be cut from the left."""
        direction = "left" if self.truncation_direction is None else self.truncation_direction
        if self.truncate and direction.lower() != "left":
            raise Refusal(
                "unsupported", "truncation_direction is served as left only: the score is read at the last token"
            )
        return bool(self.truncate)

    def applies_sigmoid(self) -> bool:
        """Whether the sigmoid is asked for."""
        return self.raw_scores is False


class PredictBody(TeiBody):
    """The body of ``/predict``."""

    inputs: Annotated[
        Annotated[str, AsText]
        | Annotated[OneOrTwo, AsPair]
        | Annotated[list[OneOrTwo], JsonList(of_items=True), AsList],
        one_of(_branch, INPUTS),
        Field(title=INPUTS),
    ]
    example: ClassVar = {"inputs": [["why? ", "because."]], "raw_scores": True}

    def parse(self) -> ParsedRequest:
        truncate, sigmoid = self.truncates(), self.applies_sigmoid()
        several = isinstance(self.inputs, list)
        inputs = self.inputs if isinstance(self.inputs, list) else [self.inputs]

        def answer(scored: ScoredRequest) -> list[Prediction] | list[list[Prediction]]:
            rows: list[list[Prediction]] = [
                [{"score": score, "label": LABEL}] for score in scored.numbers(activation=sigmoid)
            ]
            return rows if several else rows[0]

        return ParsedRequest([_item(position, one, truncate) for position, one in enumerate(inputs)], answer)


class RerankBody(TeiBody):
    """The body of ``/rerank``: ``texts``, each an answer to ``query``."""

    query: Annotated[str, Field(title="a text")]
    texts: Annotated[tuple[str, ...], JsonList(of_items=True), Field(title="a list of texts")]
    return_text: Annotated[bool | None, Field(description="whether the answer holds the texts; false by default")] = (
        None
    )
    example: ClassVar = {"query": "why? ", "texts": ["because.", "no."]}

    @classmethod
    def claims(cls, values: Mapping[str, Any]) -> bool:
        """A body with ``texts``: vLLM's has ``documents``."""
        return "texts" in values

    def parse(self) -> ParsedRequest:
        truncate, sigmoid = self.truncates(), self.applies_sigmoid()

        def answer(scored: ScoredRequest) -> list[Ranked]:
            scores = scored.numbers(activation=sigmoid)
            return [self._row(index, scores[index]) for index in best_first(scores)]

        refuse_repetition("query", self.query, len(self.texts))
        pairs = [_item(position, (self.query, text), truncate) for position, text in enumerate(self.texts)]
        return ParsedRequest(pairs, answer)

    def _row(self, index: int, score: float) -> Ranked:
        row: Ranked = {"index": index, "score": score}
        return {**row, "text": self.texts[index]} if self.return_text else row


def best_first(scores: list[float]) -> list[int]:
    """Positions by falling score; of equal scores the first one first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def info_keys(description: Mapping[str, Any], config: ServiceConfig) -> dict[str, Any]:
    """What its clients look for in ``/info``: a classifier of one class."""
    return {
        "model_id": description["model"],
        "model_sha": description.get("revision"),
        "model_dtype": str(description.get("dtype")),
        "model_type": {"classifier": {"id2label": {"0": LABEL}, "label2id": {LABEL: 0}}},
        "max_input_length": description.get("max_tokens"),
        "max_batch_tokens": config.max_batch_tokens,
        "max_client_batch_size": config.max_items,
        "max_concurrent_requests": config.max_queue_items,
        "max_batch_requests": None,
        "tokenization_workers": None,
        "sha": None,
        "docker_label": None,
    }


def _item(position: int, one: str | tuple[str, ...], truncate: bool) -> ScoreRequest:
    name = f"inputs {position}"
    texts = (one,) if isinstance(one, str) else one
    if len(texts) == 2:
        return make_item(name, prompt=texts[0], response=texts[1], truncate=truncate)
    return make_item(name, text=texts[0], truncate=truncate, add_special_tokens=True)


PREDICT = Protocol(
    name="predict",
    paths=("/predict",),
    summary="Scores as text-embeddings-inference's predict answers them",
    bodies=(PredictBody,),
    answer=list[Prediction] | list[list[Prediction]],
    refuse=as_tei,
)
