"""OpenRLHF's ``POST /get_reward``, in every generation of its body.

``query`` holds whole texts with their special tokens in them, as the policy's tokenizer decoded them. What comes beside
it (``prompts``; ``labels`` or ``metadata``) is for reward functions and is not read.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from typing_extensions import TypedDict

from rlhf_ray.serving.protocols.fields import Body, JsonList, make_item
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest

Unread = Annotated[Any, Field(description="not read")]


class Rewards(TypedDict):
    """An answer: the scores under both of the names that generations of the client look for."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, Any]


class GetRewardBody(Body):
    """The body of ``/get_reward``."""

    query: Annotated[
        tuple[str, ...],
        JsonList(of_items=True),
        Field(title="a list of texts", description="whole texts with their special tokens in them"),
    ]
    prompts: Unread = None
    labels: Unread = None
    metadata: Unread = None
    example: ClassVar = {"query": ["<bos>why? because.<eos>"], "prompts": ["<bos>why?"], "labels": [None]}

    def parse(self) -> ParsedRequest:
        return ParsedRequest(
            [make_item(f"query {position}", text=text) for position, text in enumerate(self.query)], _answer
        )


def _answer(scored: ScoredRequest) -> Rewards:
    rewards = scored.numbers()
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


GET_REWARD = Protocol(
    name="openrlhf",
    paths=("/get_reward",),
    summary="Scores of whole texts, as OpenRLHF's remote reward model answers them",
    bodies=(GetRewardBody,),
    answer=Rewards,
)
