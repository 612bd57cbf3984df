"""What every protocol is: a pure translation from a body to items, and from their results to an answer.

Always true: a protocol sees neither the network nor the model; it names every number it answers from a result that has
one, since a request whose items cannot all be answered is refused before (unless the protocol tells errors itself).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.refusals import Refusal, plain

Body = Mapping[str, Any]
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """The results of one request, and what an answer tells beside them."""

    results: Sequence[ScoreResult]
    model: str
    version: str
    request_id: str
    created: int
    """Seconds since 1970."""
    normalize: bool
    """Whether protocols that tell one number an item tell the normalised one."""

    def numbers(self, *, activation: bool = False) -> list[float]:
        """One number an item; with ``activation`` 1 / (1 + exp(-number))."""
        found = [result.reward if self.normalize else result.raw for result in self.results]
        numbers = [number for number in found if number is not None]
        assert len(numbers) == len(found), "a request with an item that has no number is refused before"
        return [sigmoid(number) for number in numbers] if activation else numbers

    @property
    def tokens(self) -> int:
        """Tokens of all items."""
        return sum(result.tokens for result in self.results)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI's interface tells them."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "completion_tokens": 0}


@dataclass(frozen=True)
class Asked:
    """What a body asks for."""

    items: Sequence[ScoreRequest | ScoreResult]
    """Items in order; one that is not well formed is its failed result already."""
    answer: Callable[[Scored], Any]
    model: str | None = None
    """The name of the model asked for; none means the first that is served."""
    tells_errors: bool = False
    """Whether the answer has a place for an item without a score."""
    request_id: str | None = None


@dataclass(frozen=True)
class Protocol:
    """One interface that callers know."""

    name: str
    paths: tuple[str, ...]
    summary: str
    read: Callable[[Body], Asked]
    request: Schema
    """JSON schema of the body, with examples."""
    response: Schema
    refuse: Callable[[Refusal], Any] = plain
    """The body of an answer that holds no scores."""


def sigmoid(number: float) -> float:
    """1 / (1 + exp(-number)), without overflow."""
    if number >= 0:
        return 1 / (1 + math.exp(-number))
    return math.exp(number) / (1 + math.exp(number))
