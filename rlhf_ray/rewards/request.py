"""The request to score one item, and its result; PPO, the scoring backend and its clients share both.

Invariants: a request holds exactly one representation of its item; messages and tools are in the one form in which training
reads them (:func:`rlhf_ray.rows.conversations.plain_messages`), so that every message has a role and a text; every text can be
encoded; a result holds finite numbers or an error, never both and never neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.rows.conversations import parts_problem, plain_messages, without_nulls
from rlhf_ray.rows.template_variables import variables_problem

Fault = Literal["item", "model", "source"]
"""Why an item has no reward. ``item``: it cannot be scored as it is. ``model``: the model gave no finite number,
or the source failed in a way that any attempt repeats. ``source``: the source failed, and another attempt may not."""

OF_EVERY_MESSAGE = frozenset({"role", "content"})
DEEPEST = 100
"""Levels of lists and mappings in a message, a tool or a variable: more than any schema has."""


@dataclass(frozen=True)
class ScoreRequest:
    """One item to score, in exactly one of four representations: ids, a text, a conversation, or a prompt and a response."""

    token_ids: tuple[int, ...] | None = None
    """Scored as they are."""
    text: str | None = None
    """Tokenised as it stands: special tokens are expected in it, unless ``add_special_tokens`` asks for the tokenizer's."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """Turns with ``role`` and ``content``, written by the reward model's own chat template, which also reads their other keys.
    A content may be a list of parts of text, or nothing beside ``tool_calls``: it becomes one text."""
    prompt: str | None = None
    """With ``response``: joined as in training by a model that was trained on texts, else turns for the same template."""
    response: str | None = None
    truncate: bool = False
    """Cut an over-long item from the left instead of refusing it; the result says so."""
    add_special_tokens: bool = False
    """Give a text the special tokens that its tokenizer adds, where they do not stand in it already."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """The functions that the assistant of ``messages`` may call, for the template."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the template for this item, such as ``enable_thinking``."""
    finished: bool = True
    """Whether the answer is whole. One that a limit has cut gets no end token, and its score is read at its last token."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise RequestError("prompt and response go together: one of them is missing")
        present = [name for name in ("token_ids", "text", "messages", "prompt") if getattr(self, name) is not None]
        if len(present) != 1:
            names = ", ".join(present) or "nothing"
            raise RequestError(f"give exactly one of token_ids, text, messages, or prompt with response; found {names}")
        if self.add_special_tokens and self.text is None:
            raise RequestError("add_special_tokens is for text: ids are scored as they are, a template adds its own")
        if self.tools and self.messages is None:
            raise RequestError("tools are for messages, whose template writes them: give the prompt as messages too")
        if self.chat_template_kwargs and self.messages is None and self.prompt is None:
            raise RequestError(
                "chat_template_kwargs are for messages, or a prompt and its response: no template writes this"
            )
        if self.chat_template_kwargs is not None and (problem := variables_problem(self.chat_template_kwargs)):
            raise RequestError(f"chat_template_kwargs must be a mapping{problem}")
        self._make_plain()
        for number, message in enumerate(self.messages or (), 1):
            if problem := _message_problem(message):
                raise RequestError(f"messages: message {number} {problem}")
        for name, text in self.texts(keys=True):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"{name} holds half of a surrogate pair at character {error.start}, so it is not valid text"
                ) from None

    def _make_plain(self) -> None:
        """Bring messages and tools into the form in which training reads them."""
        for name in ("messages", "tools", "chat_template_kwargs"):
            if depth_exceeds(getattr(self, name), DEEPEST):
                raise RequestError(f"{name} is nested deeper than {DEEPEST} levels: send it flatter")
        if self.messages is not None:
            object.__setattr__(self, "messages", tuple(plain_messages(self.messages)))
        if self.tools is not None:
            object.__setattr__(self, "tools", tuple(map(without_nulls, self.tools)) or None)

    def texts(self, *, keys: bool = False) -> Iterator[tuple[str, str]]:
        """Every text of the item, with the name of the field that holds it; ``keys`` of mappings on request."""
        for name, text in (("text", self.text), ("prompt", self.prompt), ("response", self.response)):
            if text is not None:
                yield name, text
        for name in ("messages", "tools", "chat_template_kwargs"):
            yield from ((name, text) for text in _texts_in(getattr(self, name), keys=keys))

    def written_bytes(self) -> int:
        """About how many bytes of UTF-8 a template writes of the item: its texts, and as JSON what is none."""
        texts = [text for text in (self.text, self.prompt, self.response) if text is not None]
        others: list[Any] = [value for value in (self.tools, self.chat_template_kwargs) if value]
        for message in self.messages or ():
            texts += [key for key in message if key not in OF_EVERY_MESSAGE]
            for value in message.values():
                (texts if isinstance(value, str) else others).append(value)
        return sum(len(text.encode()) for text in texts) + sum(map(_json_bytes, others))


def _message_problem(message: Any) -> str:
    """Why a message can be written by no template; empty where nothing is wrong with it."""
    if not isinstance(message, Mapping):
        return f"must be a mapping with 'role' and 'content', this is of type {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        return f"must have a text under 'role', this is {_type_name(role)}"
    if isinstance(content, list):
        return f"must have a text under 'content', this is {parts_problem(content)}"
    if not isinstance(content, str):
        return f"must have a text under 'content', or 'tool_calls', this is {_type_name(content)}"
    return ""


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"


def depth_exceeds(value: Any, levels: int) -> bool:
    """Whether lists and mappings are nested deeper than this."""
    level = [value]
    for _ in range(levels):
        level = [
            part
            for one in level
            if isinstance(one, Mapping | list | tuple)
            for part in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, Mapping | list | tuple) for one in level)


def _texts_in(value: Any, *, keys: bool) -> Iterator[str]:
    """Every text in a value of JSON, in order."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting.extend(reversed([*one, *one.values()] if keys else list(one.values())))
        elif isinstance(one, list | tuple):
            waiting.extend(reversed(one))


def _json_bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode())


PROBE = ScoreRequest(token_ids=(0,))
"""What any reward model that works can score."""


@dataclass(frozen=True)
class ScoreResult:
    """The score of one item, or why it has none."""

    raw: float | None = None
    """The model's output."""
    reward: float | None = None
    """The same after the source's normalisation."""
    tokens: int = 0
    """How many tokens went through the model."""
    truncated: bool = False
    """Whether the item lost its beginning, because it was too long."""
    error: str | None = None
    """A sentence that says why there is no reward."""
    fault: Fault | None = None

    def __post_init__(self) -> None:
        numbers = [number for number in (self.raw, self.reward) if number is not None]
        scored = len(numbers) == 2 and all(map(math.isfinite, numbers)) and self.error is None and self.fault is None
        failed = not numbers and self.error is not None and self.fault is not None
        if not scored and not failed:
            raise ScoringError(f"a result holds two finite numbers, or an error and its fault, but this is {self!r}")

    @classmethod
    def of(cls, raw: float, tokens: int = 0, *, truncated: bool = False) -> ScoreResult:
        """The result of a model's output; an error if that is not a finite number."""
        if not math.isfinite(raw):
            return cls.failed(f"the model returned {raw}, which is not a finite reward", tokens, fault="model")
        return cls(raw=raw, reward=raw, tokens=tokens, truncated=truncated)

    @classmethod
    def failed(cls, error: str, tokens: int = 0, *, fault: Fault = "item") -> ScoreResult:
        """The result of an item without a reward."""
        return cls(tokens=tokens, error=error, fault=fault)

    @classmethod
    def failed_by(cls, error: ScoringError) -> ScoreResult:
        """The result of an item at whose source ``error`` was raised."""
        return cls.failed(str(error), fault="source" if error.may_pass else "model")

    def normalised(self, mean: float, std: float) -> ScoreResult:
        """The result with ``reward = (raw - mean) / std``; a failed one stays as it is."""
        if self.raw is None:
            return self
        reward = (self.raw - mean) / std
        if not math.isfinite(reward):
            return self.failed(
                f"the reward {self.raw} normalised by mean {mean} and std {std} is {reward}", self.tokens, fault="model"
            )
        return replace(self, reward=reward)
