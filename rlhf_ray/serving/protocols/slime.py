"""slime's ``POST /rm``: one sample a request, answered by a bare number.

slime sends the prompt as its policy read it (a text with its special tokens in it, or a conversation) and the response as
it was sampled: a text is scored as prompt and response stand, one after the other; a conversation gets the response as its
last turn and goes through the reward model's template.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, Tag

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.protocols.fields import AsList, AsText, Body, Conversation, Tools, make_item, one_of
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import Refusal

PROMPT = "a text or a conversation"


def _branch(value: Any) -> Tag | None:
    if isinstance(value, str):
        return AsText
    return AsList if isinstance(value, list) else None


class RmBody(Body):
    """The body of ``/rm``."""

    prompt: Annotated[
        Annotated[str, AsText] | Annotated[Conversation, AsList],
        one_of(_branch, PROMPT),
        Field(title=PROMPT),
    ]
    response: Annotated[str, Field(title="a text")]
    tools: Annotated[
        Tools | None, Field(title="a list of objects", description="functions that a conversation may call")
    ] = None
    label: Annotated[Any, Field(description="not read")] = None
    example: ClassVar = {"prompt": "<bos>why? ", "response": "because.", "label": None}

    def parse(self) -> ParsedRequest:
        return ParsedRequest([self._item()], _answer)

    def _item(self) -> ScoreRequest:
        if isinstance(self.prompt, str):
            if self.tools:
                raise Refusal("unsupported", "tools is for a prompt that is a conversation: no template writes a text")
            return make_item("the sample", text=self.prompt + self.response)
        turns = (*self.prompt, {"role": "assistant", "content": self.response})
        return make_item("prompt", messages=turns, tools=self.tools)


def _answer(scored: ScoredRequest) -> float:
    return scored.numbers()[0]


RM = Protocol(
    name="slime",
    paths=("/rm",),
    summary="The score of one sample as a bare number, as slime's remote reward model answers it",
    bodies=(RmBody,),
    answer=float,
)
