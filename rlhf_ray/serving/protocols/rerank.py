"""vLLM's ``/score`` and ``/rerank``, the latter also as Jina's and Cohere's clients ask it.

A pair is a prompt and its response: it goes through the reward model's template, as in ``/v1/reward``. ``/rerank`` is
shared with text-embeddings-inference, whose bodies have ``texts`` in place of ``documents``.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.bodies import field, item, kind, refuse_unserved, text_of
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored
from rlhf_ray.serving.protocols import tei
from rlhf_ray.serving.protocols.classify import listing, listing_schema
from rlhf_ray.serving.protocols.inputs import COMMON, UNSERVED, activation, model_of, request_id_of, truncation
from rlhf_ray.serving.refusals import Refusal, as_openai, as_tei

PAIRED = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
UNSERVED_PAIRS = {
    **UNSERVED,
    "max_tokens_per_query": "parts of a pair are not cut",
    "max_tokens_per_doc": "parts of a pair are not cut",
    "instruction": "the reward model's own template is used as it stands",
}


def read_score(body: Body) -> Asked:
    """The pairs of a ``/score`` body: one with each of several, or one with one."""
    refuse_unserved(body, UNSERVED_PAIRS)
    names = next((pair for pair in PAIRED if all(name in body for name in pair)), None)
    if names is None:
        raise Refusal("wrong_body", f"give {', or '.join(' and '.join(pair) for pair in PAIRED)}")
    first, second = (_texts(body[name], name) for name in names)
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise Refusal(
            "wrong_body", f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}: give as many, or one"
        )
    squashed, truncate = activation(body), truncation(body)

    def answer(scored: Scored) -> Any:
        rows = enumerate(scored.numbers(activation=squashed))
        return listing("score", scored, [{"index": index, "object": "score", "score": score} for index, score in rows])

    pairs = [_pair(position, *pair, truncate) for position, pair in enumerate(zip(first, second, strict=True))]
    return Asked(pairs, answer, model=model_of(body), request_id=request_id_of(body))


def read_rerank(body: Body) -> Asked:
    """The documents of a rerank body, each an answer to the query; the best first."""
    refuse_unserved(body, UNSERVED_PAIRS)
    query = text_of(body.get("query"), "query")
    documents = _texts(body.get("documents"), "documents")
    top = field(body, "top_n", int, 0)
    if top < 0:
        raise Refusal("wrong_body", "top_n must be 0 (all) or more")
    told = field(body, "return_documents", bool, True)
    squashed, truncate = activation(body), truncation(body)

    def answer(scored: Scored) -> Any:
        scores = scored.numbers(activation=squashed)
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: top or None]
        shown = {index: {"document": {"text": documents[index]}} if told else {} for index in best}
        results = [{"index": index, **shown[index], "relevance_score": scores[index]} for index in best]
        usage = {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens}
        return {"id": f"rerank-{scored.request_id}", "model": scored.model, "usage": usage, "results": results}

    pairs = [_pair(position, query, document, truncate) for position, document in enumerate(documents)]
    return Asked(pairs, answer, model=model_of(body), request_id=request_id_of(body))


def read_either(body: Body) -> Asked:
    """A rerank body of text-embeddings-inference where it has ``texts``, else the other form."""
    return tei.read_rerank(body) if "texts" in body else read_rerank(body)


def _texts(value: Any, name: str) -> list[str]:
    """A text or texts; a document may be an object with the text ``text``."""
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list):
        raise Refusal("wrong_body", f"{name} must be a text or a list of texts, not {kind(value)}")
    found = [one.get("text") if isinstance(one, dict) else one for one in value]
    return [text_of(one, f"{name} {position}") for position, one in enumerate(found)]


def _pair(position: int, prompt: str, response: str, truncate: bool) -> ScoreRequest:
    return item(f"pair {position}", prompt=prompt, response=response, truncate=truncate)


_TEXT = {"type": "string"}
_TEXT_OR_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_COMMON = {name: value for name, value in COMMON.items() if name != "add_special_tokens"}
SCORE = Protocol(
    name="score",
    paths=("/score", "/v1/score"),
    summary="Scores of pairs, each a prompt and its response, as vLLM's score answers them",
    read=read_score,
    request={
        "type": "object",
        "properties": {name: _TEXT_OR_TEXTS for pair in PAIRED for name in pair} | _COMMON,
        "description": f"{', or '.join(' and '.join(pair) for pair in PAIRED)}",
        "example": {"text_1": "why? ", "text_2": ["because.", "no."]},
    },
    response=listing_schema({"index": {"type": "integer"}, "object": _TEXT, "score": {"type": "number"}}),
    refuse=as_openai,
)
_RESULT = {
    "type": "object",
    "required": ["index", "relevance_score"],
    "properties": {"index": {"type": "integer"}, "relevance_score": {"type": "number"}, "document": {"type": "object"}},
}
_RERANK = {
    "type": "object",
    "required": ["id", "model", "usage", "results"],
    "properties": {
        "id": _TEXT,
        "model": _TEXT,
        "usage": {"type": "object"},
        "results": {"type": "array", "items": _RESULT},
    },
}
_DOCUMENTS = {
    "query": _TEXT,
    "documents": {"type": "array", "items": {"anyOf": [_TEXT, {"type": "object"}]}},
    "top_n": {"type": ["integer", "null"], "minimum": 0},
    "return_documents": {"type": ["boolean", "null"]},
    **_COMMON,
}
RERANK = Protocol(
    name="rerank",
    paths=("/v1/rerank", "/v2/rerank"),
    summary="Answers to a query, best first, as Jina's, Cohere's and vLLM's rerank answer it",
    read=read_rerank,
    request={
        "type": "object",
        "required": ["query", "documents"],
        "properties": _DOCUMENTS,
        "example": {"query": "why? ", "documents": ["because.", "no."], "top_n": 1},
    },
    response=_RERANK,
    refuse=as_openai,
)
RERANK_OR_TEI = Protocol(
    name="rerank_or_tei",
    paths=("/rerank",),
    summary="The same; with texts in place of documents, as text-embeddings-inference answers it",
    read=read_either,
    request={
        "type": "object",
        "required": ["query"],
        "properties": {**_DOCUMENTS, **tei.RERANK_KEYS},
        "example": {"query": "why? ", "texts": ["because.", "no."]},
    },
    response={"anyOf": [_RERANK, tei.RERANK_ANSWER]},
    refuse=as_tei,
)
