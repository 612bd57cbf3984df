"""What can be scored, and what comes back: defined once for PPO, the scoring backend and its clients.

Always true: a request holds exactly one representation; a result holds finite numbers or an error, never both and never
neither. Token ids are scored as they are. Text is tokenised as it stands, without adding or removing anything: special
tokens are expected in it. Messages and a prompt with its response go through the reward model's own template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.errors import RequestError


@dataclass(frozen=True)
class ScoreRequest:
    """One item to score, in exactly one of four representations."""

    token_ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | None = None
    response: str | None = None
    truncate: bool = False
    """Cut an over-long item from the left instead of refusing it; the result says so."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise RequestError("prompt and response go together: one of them is missing")
        given = [name for name in ("token_ids", "text", "messages", "prompt") if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "nothing"
            raise RequestError(f"give exactly one of token_ids, text, messages, or prompt with response; found {found}")


@dataclass(frozen=True)
class ScoreResult:
    """The score of one item: ``raw`` is the model's output, ``reward`` is after the source's normalisation."""

    raw: float | None = None
    reward: float | None = None
    tokens: int = 0
    truncated: bool = False
    error: str | None = None

    @classmethod
    def of(
        cls, raw: float, tokens: int, *, truncated: bool = False, mean: float = 0.0, std: float = 1.0
    ) -> ScoreResult:
        """A result of a finite score; anything else becomes an error that says what the model returned."""
        if not math.isfinite(raw):
            return cls(
                tokens=tokens, truncated=truncated, error=f"the model returned {raw}, which is not a finite reward"
            )
        return cls(raw=raw, reward=(raw - mean) / std, tokens=tokens, truncated=truncated)

    @classmethod
    def failed(cls, error: str, tokens: int = 0) -> ScoreResult:
        return cls(tokens=tokens, error=error)


def requests_from_ids(sequences: Sequence[Sequence[int]]) -> list[ScoreRequest]:
    """One request for each sequence of token ids."""
    return [ScoreRequest(token_ids=tuple(int(token) for token in ids)) for ids in sequences]
