"""What a protocol reads from a body, and the results that it answers.

Invariants: every number of an answer comes from a result that has one, since a request with an item that cannot be scored is
refused before (unless the answer has a place for errors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from rlhf_ray.rewards.request import ScoreRequest, ScoreResult


class Usage(TypedDict):
    """How many tokens were scored, in the words of OpenAI's interface."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ScoredRequest:
    """The results of one request, and what an answer says besides."""

    results: Sequence[ScoreResult]
    """One result per item, in the order of the items."""
    model: str
    version: str
    request_id: str
    created: int
    """Seconds since 1970."""
    normalize: bool
    """Whether a protocol with one number per item answers the normalised reward instead of the raw score."""

    def numbers(self, *, activation: bool = False) -> list[float]:
        """One number per item; with ``activation`` its sigmoid."""
        chosen = [result.reward if self.normalize else result.raw for result in self.results]
        numbers = [number for number in chosen if number is not None]
        assert len(numbers) == len(chosen), "a request with an item that has no number is refused before"
        return [sigmoid(number) for number in numbers] if activation else numbers

    @property
    def tokens(self) -> int:
        """Tokens of all items together."""
        return sum(result.tokens for result in self.results)

    @property
    def usage(self) -> Usage:
        """The tokens in the words of OpenAI's interface."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "completion_tokens": 0}


@dataclass(frozen=True)
class ParsedRequest:
    """What a body asks for."""

    items: Sequence[ScoreRequest | ScoreResult]
    """The items in order; one that is not well formed stands here as its failed result."""
    answer: Callable[[ScoredRequest], Any]
    """Makes the body of the answer."""
    model: str | None = None
    """The name of the model asked for; None means the first that is served."""
    reports_errors: bool = False
    """Whether the answer has a place for an item without a score."""
    request_id: str | None = None


def sigmoid(number: float) -> float:
    """1 / (1 + exp(-number)), without overflow."""
    if number >= 0:
        return 1 / (1 + math.exp(-number))
    return math.exp(number) / (1 + math.exp(number))
