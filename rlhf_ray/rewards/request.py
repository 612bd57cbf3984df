"""The request to score one item, and its result; PPO, the scoring backend and its clients share both.

Invariants: a request holds exactly one representation of its item; a result holds finite numbers or an error, never both and
never neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_ray.errors import RequestError, ScoringError

Fault = Literal["item", "model", "source"]
"""Why an item has no reward. ``item``: it cannot be scored as it is. ``model``: the model gave no finite number.
``source``: the source failed, and another attempt may not."""


@dataclass(frozen=True)
class ScoreRequest:
    """One item to score, in exactly one of four representations: ids, a text, a conversation, or a prompt and a response."""

    token_ids: tuple[int, ...] | None = None
    """Scored as they are."""
    text: str | None = None
    """Tokenised as it stands: special tokens are expected in it, unless ``add_special_tokens`` asks for the tokenizer's."""
    messages: tuple[Mapping[str, str], ...] | None = None
    """Turns with ``role`` and ``content``, written by the reward model's own chat template."""
    prompt: str | None = None
    """With ``response``, written by the same template; where the model has none, joined as in training."""
    response: str | None = None
    truncate: bool = False
    """Cut an over-long item from the left instead of refusing it; the result says so."""
    add_special_tokens: bool = False
    """Give a text the special tokens that its tokenizer adds, where they do not stand in it already."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise RequestError("prompt and response go together: one of them is missing")
        present = [name for name in ("token_ids", "text", "messages", "prompt") if getattr(self, name) is not None]
        if len(present) != 1:
            names = ", ".join(present) or "nothing"
            raise RequestError(f"give exactly one of token_ids, text, messages, or prompt with response; found {names}")
        if self.add_special_tokens and self.text is None:
            raise RequestError("add_special_tokens is for text: ids are scored as they are, a template adds its own")
        for name, text in self.texts():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"{name} holds half of a surrogate pair at character {error.start}, so it is not valid text"
                ) from None

    def texts(self) -> Iterator[tuple[str, str]]:
        """Every text of the item, with the name of the field that holds it."""
        for name, text in (("text", self.text), ("prompt", self.prompt), ("response", self.response)):
            if text is not None:
                yield name, text
        for message in self.messages or ():
            yield "messages", message["role"]
            yield "messages", message["content"]


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
