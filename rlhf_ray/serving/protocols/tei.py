"""text-embeddings-inference's ``/predict`` and ``/rerank``.

A pair is a prompt and its response. Scores are raw unless ``raw_scores`` is false; an item is cut only where ``truncate``
asks for it, and from the left only: the score is read at the last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.serving import ServiceConfig
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.bodies import field, item, kind, text_of
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored
from rlhf_ray.serving.refusals import Refusal, as_tei

LABEL = "LABEL_0"


def read_predict(body: Body) -> Asked:
    """``inputs``: a text, a pair of texts, or a list of lists of one or two texts."""
    given = body.get("inputs")
    truncate, squashed = _truncation(body), _squashed(body)
    several = isinstance(given, list) and all(isinstance(one, list) for one in given)
    if not several and not isinstance(given, str | list):
        raise Refusal(
            "wrong_body", f"inputs must be a text, a pair of texts, or a list of such lists, not {kind(given)}"
        )
    items = [_one(position, one, truncate) for position, one in enumerate(given if several else [given])]

    def answer(scored: Scored) -> Any:
        rows = [[{"score": score, "label": LABEL}] for score in scored.numbers(activation=squashed)]
        return rows if several else rows[0]

    return Asked(items, answer)


def read_rerank(body: Body) -> Asked:
    """``texts``, each an answer to ``query``; the best first."""
    query, texts = text_of(body.get("query"), "query"), body.get("texts")
    if not isinstance(texts, list):
        raise Refusal("wrong_body", f"texts must be a list of texts, not {kind(texts)}")
    truncate, squashed = _truncation(body), _squashed(body)
    told = field(body, "return_text", bool, False)
    items = [_one(position, [query, text], truncate) for position, text in enumerate(texts)]

    def answer(scored: Scored) -> Any:
        scores = scored.numbers(activation=squashed)
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
        return [{"index": index, "score": scores[index], **({"text": texts[index]} if told else {})} for index in best]

    return Asked(items, answer)


def info_keys(described: Mapping[str, Any], config: ServiceConfig) -> dict[str, Any]:
    """What its clients look for in ``/info``: a classifier of one class."""
    return {
        "model_id": described["model"],
        "model_sha": described.get("revision"),
        "model_dtype": str(described.get("dtype")),
        "model_type": {"classifier": {"id2label": {"0": LABEL}, "label2id": {LABEL: 0}}},
        "max_input_length": described.get("max_tokens"),
        "max_batch_tokens": config.max_batch_tokens,
        "max_client_batch_size": config.max_items,
        "max_concurrent_requests": config.max_queue_items,
        "max_batch_requests": None,
        "tokenization_workers": None,
        "sha": None,
        "docker_label": None,
    }


def _one(position: int, given: Any, truncate: bool) -> ScoreRequest:
    name = f"input {position}"
    parts = [given] if isinstance(given, str) else given
    if not 1 <= len(parts) <= 2:
        raise Refusal("wrong_body", f"{name} must be one text or a pair, not {len(parts)} of them")
    texts = [text_of(part, name) for part in parts]
    if len(texts) == 2:
        return item(name, prompt=texts[0], response=texts[1], truncate=truncate)
    return item(name, text=texts[0], truncate=truncate, add_special_tokens=True)


def _truncation(body: Body) -> bool:
    truncate = field(body, "truncate", bool, False)
    side = field(body, "truncation_direction", str, "left")
    if truncate and side.lower() != "left":
        raise Refusal("unsupported", "truncation_direction is served as left only: the score is read at the last token")
    return truncate


def _squashed(body: Body) -> bool:
    return not field(body, "raw_scores", bool, True)


_TEXT = {"type": "string"}
_KEYS = {
    "raw_scores": {"type": ["boolean", "null"], "description": "false applies the sigmoid; true by default"},
    "truncate": {"type": ["boolean", "null"]},
    "truncation_direction": {"enum": ["left", "Left", None]},
}
RERANK_KEYS = {**_KEYS, "texts": {"type": "array", "items": _TEXT}, "return_text": {"type": ["boolean", "null"]}}
_PREDICTION = {
    "type": "object",
    "required": ["score", "label"],
    "properties": {"score": {"type": "number"}, "label": _TEXT},
}
_PREDICTIONS = {"type": "array", "items": _PREDICTION}
RERANK_ANSWER = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["index", "score"],
        "properties": {"index": {"type": "integer"}, "score": {"type": "number"}, "text": _TEXT},
    },
}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2}
PREDICT = Protocol(
    name="predict",
    paths=("/predict",),
    summary="Scores as text-embeddings-inference's predict answers them",
    read=read_predict,
    request={
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": {"anyOf": [_TEXT, _TEXTS, {"type": "array", "items": _TEXTS}]}, **_KEYS},
        "example": {"inputs": [["why? ", "because."]], "raw_scores": True},
    },
    response={"anyOf": [_PREDICTIONS, {"type": "array", "items": _PREDICTIONS}]},
    refuse=as_tei,
)
