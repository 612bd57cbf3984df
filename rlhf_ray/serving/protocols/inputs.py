"""The fields that the bodies of vLLM's, SGLang's and OpenAI's interfaces have in common.

``input`` is a text, a list of texts, token ids or a list of lists of token ids; or ``messages`` is a conversation. As
there, a text gets the special tokens of the reward model's tokenizer (never a second time, where it begins or ends with
them) unless ``add_special_tokens`` is false; ids are scored as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, Tag
from typing_extensions import TypedDict

from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.protocols.fields import (
    AsIds,
    AsList,
    AsText,
    Body,
    Conversation,
    JsonList,
    Only,
    TokenIds,
    Tools,
    Unserved,
    Variables,
    make_item,
    one_of,
    type_name,
)
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest, Usage
from rlhf_ray.serving.refusals import Refusal

INPUT = "a text, texts, token ids or lists of them"
TEMPLATE = "the reward model's own template is used"
LAST_ANSWER = "a conversation is scored at its last answer"


def _branch_of_one(value: Any) -> Tag | None:
    if isinstance(value, str):
        return AsText
    return AsIds if isinstance(value, list) else None


def _branch_of_input(value: Any) -> Tag | None:
    if isinstance(value, list):
        return AsIds if value and type(value[0]) is int else AsList
    return AsText if isinstance(value, str) else None


OneInput = Annotated[
    Annotated[str, AsText] | Annotated[TokenIds, AsIds],
    one_of(_branch_of_one, "a text or token ids"),
]
Input = Annotated[
    Annotated[str, AsText] | Annotated[TokenIds, AsIds] | Annotated[list[OneInput], JsonList(of_items=True), AsList],
    one_of(_branch_of_input, INPUT),
]


class CommonBody(Body):
    """What every body of these interfaces may say."""

    model: str | None = None
    request_id: str | None = None
    use_activation: Annotated[bool | None, Field(description="apply the sigmoid; scores are raw by default")] = None
    activation: Annotated[bool | None, Field(description="an older name of use_activation")] = None
    softmax: Annotated[bool | None, Field(description="an older name of use_activation")] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Only((-1,), "is served as -1 only: cut at the model's limit")] | None,
        Field(description="-1 cuts an item that is too long from the left"),
    ] = None
    truncation_side: Annotated[str | None, Field(description="left, where truncation is asked for")] = None
    chat_template: Annotated[Any, Unserved(TEMPLATE)] = None
    chat_template_kwargs: Annotated[Any, Unserved(f"{TEMPLATE} as it stands")] = None
    add_generation_prompt: Annotated[Any, Unserved(LAST_ANSWER)] = None
    continue_final_message: Annotated[Any, Unserved(LAST_ANSWER)] = None
    mm_processor_kwargs: Annotated[Any, Unserved("there is text only")] = None
    normalize: Annotated[Any, Unserved("set normalize where the service is started")] = None

    def applies_sigmoid(self) -> bool:
        """Whether the sigmoid is asked for, under any of the names it had; raw scores where nothing is said."""
        names = {"use_activation": self.use_activation, "activation": self.activation, "softmax": self.softmax}
        flags = {name: flag for name, flag in names.items() if flag is not None}
        if len(set(flags.values())) > 1:
            raise Refusal("wrong_body", f"{' and '.join(flags)} say different things: keep one")
        return any(flags.values())

    def truncates(self) -> bool:
        """Whether an item that is too long is to be cut from the left."""
        if self.truncate_prompt_tokens is not None and self.truncation_side not in (None, "left"):
            raise Refusal("unsupported", "truncation_side is served as left only: the score is read at the last token")
        return self.truncate_prompt_tokens is not None

    def request(self, items: Sequence[ScoreRequest], answer: Callable[[ScoredRequest], Any]) -> ParsedRequest:
        """What is asked for: these items, of the model and under the identity that the body names."""
        return ParsedRequest(items, answer, model=self.model or None, request_id=self.request_id or None)


class InputBody(CommonBody):
    """A body with ``input`` or ``messages``."""

    input: Annotated[
        Input | None, Field(title=INPUT, description="a text, texts, token ids, or lists of token ids")
    ] = None
    messages: Annotated[
        Conversation,
        Field(
            title="a list of objects with the texts role and content",
            description="a conversation, instead of input; a content may be parts of text, or null beside tool_calls",
        ),
    ] = ()
    tools: Annotated[
        Tools | None, Field(title="a list of objects", description="functions that the assistant of messages may call")
    ] = None
    chat_template_kwargs: Annotated[Variables | None, Field(title="an object")] = None
    add_special_tokens: Annotated[
        bool | None, Field(description="to texts, as the tokenizer does; true by default")
    ] = None

    def items(self) -> list[ScoreRequest]:
        """The items of ``input`` or ``messages``."""
        truncate = self.truncates()
        if "messages" in self.model_fields_set:
            if self.input is not None:
                raise Refusal("wrong_body", "give input or messages, not both")
            return [
                make_item(
                    "messages",
                    messages=self.messages,
                    tools=self.tools,
                    chat_template_kwargs=self.chat_template_kwargs,
                    truncate=truncate,
                )
            ]
        for name in ("tools", "chat_template_kwargs"):
            if getattr(self, name):
                raise Refusal("unsupported", f"{name} is for messages: no template writes input")
        if self.input is None:
            raise Refusal("wrong_body", f"input must be {INPUT}, not {type_name(self.input)}")
        if isinstance(self.input, list):
            return [self._item(f"input {position}", one, truncate) for position, one in enumerate(self.input)]
        return [self._item("input", self.input, truncate)]

    def _item(self, name: str, one: str | tuple[int, ...], truncate: bool) -> ScoreRequest:
        if isinstance(one, tuple):
            return make_item(name, token_ids=one, truncate=truncate)
        return make_item(name, text=one, truncate=truncate, add_special_tokens=self.add_special_tokens is not False)


Row = TypeVar("Row")


class Listing(TypedDict, Generic[Row]):
    """An answer in the shape of OpenAI's lists."""

    id: str
    object: str
    created: int
    model: str
    data: list[Row]
    usage: Usage


def listing(prefix: str, scored: ScoredRequest, rows: list[Row]) -> Listing[Row]:
    """The answer with these rows; ``prefix`` begins its identity."""
    return {
        "id": f"{prefix}-{scored.request_id}",
        "object": "list",
        "created": scored.created,
        "model": scored.model,
        "data": rows,
        "usage": scored.usage,
    }
