"""vLLM's ``/score`` and ``/rerank``, the latter also as Jina's and Cohere's clients ask it.

A pair is a prompt and its response: it goes through the reward model's template, as in ``/v1/reward``. ``/rerank`` is
shared with text-embeddings-inference, whose bodies have ``texts`` in place of ``documents``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.protocols import tei
from rlhf_ray.serving.protocols.fields import Document, Texts, Unserved, make_item, refuse_repetition
from rlhf_ray.serving.protocols.inputs import TEMPLATE, CommonBody, Listing, listing
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import Refusal, as_openai, as_tei

NOT_CUT = "parts of a pair are not cut"
PairedTexts = Annotated[Texts, Field(title="a text or a list of texts")]


class PairBody(CommonBody):
    """What the bodies of pairs have in common."""

    max_tokens_per_query: Annotated[Any, Unserved(NOT_CUT)] = None
    max_tokens_per_doc: Annotated[Any, Unserved(NOT_CUT)] = None
    instruction: Annotated[Any, Unserved(f"{TEMPLATE} as it stands")] = None


class ScoredPair(TypedDict):
    """One pair of an answer of ``/score``."""

    index: int
    object: str
    score: float


class ScoreBody(PairBody):
    """The body of ``/score``: one prompt with each of several responses, or as many prompts as responses.

    The forms below differ in the keys of the two; this one is left for a body that has none of them.
    """

    keys: ClassVar[tuple[str, str] | None] = None
    """Under which keys the prompts and the responses stand."""
    example: ClassVar = {}

    @classmethod
    def claims(cls, values: Mapping[str, Any]) -> bool:
        """A body with both keys."""
        return cls.keys is None or values.keys() >= set(cls.keys)

    def parse(self) -> ParsedRequest:
        pairs, sigmoid = self._pairs(), self.applies_sigmoid()

        def answer(scored: ScoredRequest) -> Listing[ScoredPair]:
            scores = enumerate(scored.numbers(activation=sigmoid))
            rows: list[ScoredPair] = [{"index": index, "object": "score", "score": score} for index, score in scores]
            return listing("score", scored, rows)

        return self.request(pairs, answer)

    def _pairs(self) -> list[ScoreRequest]:
        truncate = self.truncates()
        if self.keys is None:
            known = ", or ".join(" and ".join(form.keys) for form in SCORE_FORMS if form.keys is not None)
            raise Refusal("wrong_body", f"give {known}")
        prompts, responses = self.sides()
        if len(prompts) == 1:
            refuse_repetition(self.keys[0], prompts[0], len(responses))
            prompts = prompts * len(responses)
        if len(prompts) != len(responses):
            first, second = self.keys
            raise Refusal(
                "wrong_body",
                f"{first} has {len(prompts)} texts and {second} {len(responses)}: give as many, or one",
            )
        pairs = enumerate(zip(prompts, responses, strict=True))
        return [_pair(position, prompt, response, truncate) for position, (prompt, response) in pairs]

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The prompts and the responses."""
        return (), ()


class TextsBody(ScoreBody):
    """Pairs in ``text_1`` and ``text_2``."""

    text_1: PairedTexts
    text_2: PairedTexts
    keys: ClassVar = ("text_1", "text_2")
    example: ClassVar = {"text_1": "why? ", "text_2": ["because.", "no."]}

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.text_1, self.text_2


class DocumentsBody(ScoreBody):
    """Pairs in ``queries`` and ``documents``."""

    queries: PairedTexts
    documents: PairedTexts
    keys: ClassVar = ("queries", "documents")
    example: ClassVar = {"queries": ["why? ", "how? "], "documents": ["because.", "so."]}

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.queries, self.documents


class ItemsBody(ScoreBody):
    """Pairs in ``queries`` and ``items``."""

    queries: PairedTexts
    items: PairedTexts
    keys: ClassVar = ("queries", "items")
    example: ClassVar = {"queries": "why? ", "items": ["because.", "no."]}

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.queries, self.items


class DataBody(ScoreBody):
    """Pairs in ``data_1`` and ``data_2``."""

    data_1: PairedTexts
    data_2: PairedTexts
    keys: ClassVar = ("data_1", "data_2")
    example: ClassVar = {"data_1": "why? ", "data_2": "because."}

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.data_1, self.data_2


SCORE_FORMS = (TextsBody, DocumentsBody, ItemsBody, DataBody, ScoreBody)


class RankedDocument(TypedDict):
    """One document of an answer; ``index`` is its position in the body."""

    index: int
    relevance_score: float
    document: NotRequired[Document]


class RerankUsage(TypedDict):
    """How many tokens were scored."""

    prompt_tokens: int
    total_tokens: int


class Reranked(TypedDict):
    """An answer of ``/rerank``."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RankedDocument]


class RerankBody(PairBody):
    """The body of ``/rerank``: documents, each an answer to the query."""

    query: Annotated[str, Field(title="a text")]
    documents: PairedTexts
    top_n: Annotated[int | None, Field(ge=0, title="0 (all) or more", description="how many to answer, best first")] = (
        None
    )
    return_documents: Annotated[bool | None, Field(description="whether the answer holds them; true by default")] = None
    example: ClassVar = {"query": "why? ", "documents": ["because.", "no."], "top_n": 1}

    def parse(self) -> ParsedRequest:
        sigmoid, truncate = self.applies_sigmoid(), self.truncates()

        def answer(scored: ScoredRequest) -> Reranked:
            scores = scored.numbers(activation=sigmoid)
            best = tei.best_first(scores)[: self.top_n or None]
            return {
                "id": f"rerank-{scored.request_id}",
                "model": scored.model,
                "usage": {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens},
                "results": [self._row(index, scores[index]) for index in best],
            }

        refuse_repetition("query", self.query, len(self.documents))
        pairs = [_pair(position, self.query, text, truncate) for position, text in enumerate(self.documents)]
        return self.request(pairs, answer)

    def _row(self, index: int, score: float) -> RankedDocument:
        if self.return_documents is False:
            return {"index": index, "relevance_score": score}
        return {"index": index, "document": {"text": self.documents[index]}, "relevance_score": score}


def _pair(position: int, prompt: str, response: str, truncate: bool) -> ScoreRequest:
    return make_item(f"pair {position}", prompt=prompt, response=response, truncate=truncate)


SCORE = Protocol(
    name="score",
    paths=("/score", "/v1/score"),
    summary="Scores of pairs, each a prompt and its response, as vLLM's score answers them",
    bodies=SCORE_FORMS,
    answer=Listing[ScoredPair],
    refuse=as_openai,
)
RERANK = Protocol(
    name="rerank",
    paths=("/v1/rerank", "/v2/rerank"),
    summary="Answers to a query, best first, as Jina's, Cohere's and vLLM's rerank answer it",
    bodies=(RerankBody,),
    answer=Reranked,
    refuse=as_openai,
)
RERANK_OR_TEI = Protocol(
    name="rerank_or_tei",
    paths=("/rerank",),
    summary="The same; with texts in place of documents, as text-embeddings-inference answers it",
    bodies=(tei.RerankBody, RerankBody),
    answer=list[tei.Ranked] | Reranked,
    refuse=as_tei,
)
