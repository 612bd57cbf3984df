"""This project's own ``POST /v1/reward``: items in any representation, and each with its own result or error."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, cast

from pydantic import ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, with_config
from typing_extensions import TypedDict

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import Fault, ScoreRequest, ScoreResult
from rlhf_ray.serving.protocols.fields import (
    Body,
    Conversation,
    JsonList,
    TokenIds,
    Tools,
    Variables,
    explain,
    type_name,
)
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest


@with_config(ConfigDict(strict=True, extra="forbid"))
class Item(TypedDict, total=False):
    """Exactly one of token_ids, text, messages, or prompt with response."""

    token_ids: TokenIds
    text: str
    messages: Conversation
    tools: Annotated[Tools, Field(description="functions that the assistant of messages may call")]
    chat_template_kwargs: Variables
    prompt: str
    response: str
    truncate: Annotated[bool, Field(description="cut an item that is too long from the left; false by default")]
    add_special_tokens: Annotated[bool, Field(description="to a text, as its tokenizer does; false by default")]
    finished: Annotated[bool, Field(description="false for an answer that a limit has cut: it gets no end token")]


KEYS = frozenset(Item.__annotations__)


def _read_item(value: Any, validate: ValidatorFunctionWrapHandler) -> ScoreRequest | ScoreResult:
    """The item, or its failed result where it is not well formed."""
    if not isinstance(value, dict):
        return ScoreResult.failed(f"an item must be a JSON object, not {type_name(value)}")
    if not value.keys() <= KEYS:
        return ScoreResult.failed(
            "unknown key: an item has token_ids, text, messages, or prompt and response; and it may have truncate, with text "
            "add_special_tokens, with an answer finished, with messages tools, and with what a template writes "
            "chat_template_kwargs"
        )
    try:
        return ScoreRequest(**validate(value))
    except ValidationError as error:
        return ScoreResult.failed(explain(error.errors(include_url=False)[0])[1])
    except RequestError as error:
        return ScoreResult.failed(str(error))


class RewardBody(Body):
    """The body of ``/v1/reward``; an item that is not well formed fails alone."""

    items: Annotated[list[Annotated[Item, WrapValidator(_read_item)]], JsonList(of_items=True), Field(title="a list")]
    model: str | None = None
    example: ClassVar = {
        "items": [{"prompt": "why? ", "response": "because."}, {"token_ids": [1, 5, 6], "truncate": True}]
    }

    def parse(self) -> ParsedRequest:
        items = cast("list[ScoreRequest | ScoreResult]", self.items)  # which is what _read_item makes of them
        return ParsedRequest(items, _answer, model=self.model or None, reports_errors=True)


class Result(TypedDict):
    """The result of one item: two numbers, or an error and its fault."""

    raw: Annotated[float | None, Field(description="the model's output")]
    reward: Annotated[
        float | None, Field(description="normalised where the model's directory has a mean and a deviation")
    ]
    tokens: int
    truncated: bool
    error: str | None
    fault: Fault | None


class Results(TypedDict):
    """An answer: one result per item, in the order of the items."""

    request_id: str
    model: str
    version: str
    results: list[Result]


def _answer(scored: ScoredRequest) -> Results:
    return {
        "request_id": scored.request_id,
        "model": scored.model,
        "version": scored.version,
        "results": [_result(result) for result in scored.results],
    }


def _result(result: ScoreResult) -> Result:
    return {
        "raw": result.raw,
        "reward": result.reward,
        "tokens": result.tokens,
        "truncated": result.truncated,
        "error": result.error,
        "fault": result.fault,
    }


REWARD = Protocol(
    name="reward",
    paths=("/v1/reward",),
    summary="Scores of items in any representation; a bad item fails alone",
    bodies=(RewardBody,),
    answer=Results,
)
