"""Request bodies as pydantic models: one class is the reader of a body, its JSON schema and its example.

Invariants: a value must have the JSON type that its field declares, and nothing is converted; an unknown key is
ignored; an error names the key, what its value must be and the type of what was sent, but never the value, which may be
a caller's text; a list is read only up to its first error, and a list of too many items not at all, so that hostile bodies
cost no more than good ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NotRequired, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    with_config,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema
from typing_extensions import TypedDict

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.protocols.requests import ParsedRequest
from rlhf_ray.serving.refusals import KINDS, Refusal

JSON_TYPES: Mapping[str, str] = {
    "bool_type": "true or false",
    "string_type": "a text",
    "int_type": "a whole number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "missing": "a text",  # inside a value only texts can be missing; a field of a body has a title
}
"""What a value must be, by pydantic's name of the error."""
BRANCH = "as "
"""The tags of unions begin with it, so that they can be told from the keys and positions of a location."""
AsText, AsIds, AsList, AsPair, AsNothing = map(Tag, ("as text", "as ids", "as list", "as pair", "as nothing"))
MOST_REPEATED = 64_000_000
"""Characters of a text together that stands once in a body and in many of its items."""
OF_NO_BRANCH = "of_no_branch"
"""The error of a value that is of no branch of its union."""


class Body(BaseModel):
    """What the body of a request may hold; a protocol has one subclass for each form of its bodies."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, hide_input_in_errors=True, protected_namespaces=()
    )
    example: ClassVar[Mapping[str, Any]]
    """A body of this form, for the documentation; empty where no body of this form is answered."""

    @classmethod
    def claims(cls, values: Mapping[str, Any]) -> bool:
        """Whether a body is of this form, where a protocol has several."""
        return True

    @classmethod
    def read(cls, values: Mapping[str, Any], *, max_items: int | None = None) -> ParsedRequest:
        """The items of a body and how they are answered; raises a :class:`Refusal` for a body that is not of this form."""
        try:
            body = cls.model_validate(values, context=max_items)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise Refusal(*explain(first, cls)) from None  # pydantic's own error holds the value
        return body.parse()

    @abstractmethod
    def parse(self) -> ParsedRequest:
        """The items and how they are answered."""


def explain(error: ErrorDetails, form: type[Body] | None = None) -> tuple[str, str]:
    """The kind and the sentence of a refusal; a field of ``form`` is called by its title."""
    location = [part for part in error["loc"] if not str(part).startswith(BRANCH)]
    name = " ".join(map(str, location))
    if error["type"] == "too_many_items":
        return error["type"], error["msg"]
    if error["type"] in KINDS:  # an error of ours, see below
        return error["type"], f"{name} {error['msg']}"
    if error["type"] == "string_unicode":  # of a key: a text like this is refused with its item
        return "wrong_body", f"{name} has a key that holds half of a surrogate pair, which is no text"
    title = form.model_fields[str(location[0])].title if form is not None and len(location) == 1 else None
    words = error["msg"] if error["type"] == OF_NO_BRANCH else title or JSON_TYPES[error["type"]]
    value = None if error["type"] == "missing" else error["input"]
    return "wrong_body", f"{name} must be {words}, not {type_name(value)}"


def one_of(branches: Callable[[Any], Tag | None], words: str) -> Discriminator:
    """Chooses the branch of a union by a value's type; ``words`` say in a refusal what the value must be."""

    def tag(value: Any) -> str | None:
        branch = branches(value)
        return None if branch is None else branch.tag

    return Discriminator(tag, custom_error_type=OF_NO_BRANCH, custom_error_message=words)


def type_name(value: Any) -> str:
    """The type of a value, which a message may name although it must not show the value."""
    return "nothing" if value is None else type(value).__name__


def make_item(name: str, **values: Any) -> ScoreRequest:
    """A request of ``values``; ``name`` says in a refusal where in the body they stand."""
    try:
        return ScoreRequest(**values)
    except RequestError as error:
        raise Refusal("item", f"{name}: {error}") from error


def refuse_repetition(name: str, text: str, times: int) -> None:
    """Refuse a text that is part of so many items that it would be read as a body many times as large as any may be."""
    if len(text) * times > MOST_REPEATED:
        raise Refusal(
            "body_too_large",
            f"{name} has {len(text)} characters and is part of {times} items, {len(text) * times} in all, and the limit is "
            f"{MOST_REPEATED}: shorten it, or send fewer items",
        )


@dataclass(frozen=True)
class Unserved:
    """Marks a field that would change a score and is not served: only null, false, 0 and empty values pass."""

    reason: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._refuse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "description": f"not served: {self.reason}"}

    def _refuse(self, value: Any) -> Any:
        if value in (None, False, 0, {}, []):
            return value
        raise PydanticCustomError("unsupported", "is not served: {reason}", {"reason": self.reason})


@dataclass(frozen=True)
class Only:
    """Marks a field of which these values are served; another value of its type is refused with ``sentence``."""

    values: tuple[str | int, ...]
    sentence: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._refuse, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": list(self.values)}

    def _refuse(self, value: Any) -> Any:
        if value in self.values:
            return value
        raise PydanticCustomError("unsupported", "{sentence}", {"sentence": self.sentence})


@dataclass(frozen=True)
class JsonList:
    """Marks a list or a tuple that is read from a JSON list, up to the first element that is wrong."""

    of_items: bool = False
    """Whether each element is an item: a list of more items than one request may hold is refused before it is read."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = cast("core_schema.ListSchema | core_schema.TupleSchema", handler(source))
        schema["strict"] = False  # a JSON list may become a tuple; the elements stay as strict as the body
        schema["fail_fast"] = True
        return core_schema.with_info_before_validator_function(_refuse_many, schema) if self.of_items else schema


def _refuse_many(value: Any, info: ValidationInfo[int | None]) -> Any:
    """Refuse a list that is longer than the context of the validation, the number of items that a request may hold."""
    if isinstance(value, list) and info.context is not None and len(value) > info.context:
        raise PydanticCustomError(
            "too_many_items",
            "{count} items in one request, the limit is {limit}",
            {"count": len(value), "limit": info.context},
        )
    return value


@with_config(ConfigDict(strict=True, extra="allow"))
class Part(TypedDict):
    """One of several parts of a content, which are joined by line breaks; parts that are no texts are refused."""

    type: str
    text: NotRequired[str]


def _branch_of_content(value: Any) -> Tag | None:
    if isinstance(value, list):
        return AsList
    return AsText if isinstance(value, str) else AsNothing if value is None else None


Content = Annotated[
    Annotated[str, AsText] | Annotated[list[Part], JsonList(), AsList] | Annotated[None, AsNothing],
    one_of(_branch_of_content, "a text, parts of text, or null beside tool_calls"),
]


@with_config(ConfigDict(strict=True, extra="allow"))
class Turn(TypedDict):
    """One turn of a conversation; its other keys reach the reward model's template, as they do in training."""

    role: str
    content: NotRequired[Content]
    tool_calls: NotRequired[Annotated[list[dict[str, Any]], JsonList()] | None]


Tools = Annotated[tuple[dict[str, Any], ...], JsonList()]
Variables = Annotated[dict[str, Any], Field(description="variables of the reward model's template")]
TokenIds = Annotated[tuple[int, ...], JsonList()]
Conversation = Annotated[tuple[Turn, ...], JsonList()]


class Document(TypedDict):
    """A text as rerank's clients also send it."""

    text: str


def _text_of_document(value: Any) -> Any:
    return value.get("text") if isinstance(value, dict) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


_Text = Annotated[str, BeforeValidator(_text_of_document, json_schema_input_type=str | Document)]
Texts = Annotated[
    tuple[_Text, ...],
    JsonList(of_items=True),
    BeforeValidator(_as_list, json_schema_input_type=str | Document | list[str | Document]),
]
"""A text or a list of texts; each may also be an object with the text ``text``."""
