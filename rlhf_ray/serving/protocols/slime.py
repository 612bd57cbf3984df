"""slime's ``POST /rm``: one sample a request, answered by a bare number.

slime sends the prompt as its policy read it (a text with its special tokens in it, or a conversation) and the response as
it was sampled: a text is scored as prompt and response stand, one after the other; a conversation gets the response as its
last turn and goes through the reward model's template.
"""

from __future__ import annotations

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.bodies import item, messages_of, text_of
from rlhf_ray.serving.protocol import Asked, Body, Protocol, Scored


def read(body: Body) -> Asked:
    """The one item of a body; ``label`` is for reward functions and is not read."""
    return Asked([_item(body.get("prompt"), text_of(body.get("response"), "response"))], _answer)


def _item(prompt: object, response: str) -> ScoreRequest:
    if isinstance(prompt, list):
        turns = (*messages_of(prompt, "prompt"), {"role": "assistant", "content": response})
        return item("the sample", messages=turns)
    return item("the sample", text=text_of(prompt, "prompt") + response)


def _answer(scored: Scored) -> float:
    return scored.numbers()[0]


RM = Protocol(
    name="slime",
    paths=("/rm",),
    summary="The score of one sample as a bare number, as slime's remote reward model answers it",
    read=read,
    request={
        "type": "object",
        "required": ["prompt", "response"],
        "properties": {
            "prompt": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
            "response": {"type": "string"},
            "label": {"description": "not read"},
        },
        "example": {"prompt": "<bos>why? ", "response": "because.", "label": None},
    },
    response={"type": "number"},
)
