"""The rewards of the steps of an answer, and the tokens of the policy's own ids at which they stand.

Invariants: a step stands at the first token up to which the ids decode to all of its text; nothing is tokenized again. The
step that ends an answer stands at its last action, the end token included. No reward is lost or moved to another step: an end
that no token has is an error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.rewards.request import ScoreResult

Steps = tuple[tuple[int, float], ...]
"""For each step its end, as the number of characters of the answer up to there, and its reward; in the order of the text."""
Reduction = Literal["sum", "min", "last"]


@dataclass(frozen=True)
class SteppedResult(ScoreResult):
    """A reward that is the sum of the rewards of steps."""

    steps: Steps = ()

    @classmethod
    def of_steps(cls, steps: Steps) -> SteppedResult | ScoreResult:
        """The result of an answer with these steps; an error where there are none, or their sum is no finite number."""
        if not steps:
            return ScoreResult.failed("an answer has one step at least, which ends where it ends", fault="model")
        total = ScoreResult.of(reduced(steps, "sum"))
        return total if total.raw is None else cls(raw=total.raw, reward=total.reward, steps=steps)


def reduced(steps: Steps, reduction: Reduction) -> float:
    """One score of the rewards of some steps."""
    rewards = [reward for _, reward in steps]
    if reduction == "sum":
        return sum(rewards)
    return min(rewards) if reduction == "min" else rewards[-1]


def misplaced(steps: Steps, response: str) -> str | None:
    """What is wrong with the ends of steps in an answer; None where nothing is."""
    before = 0
    for number, (end, _) in enumerate(steps, 1):
        if end == len(response) == 0 and len(steps) == 1:
            return None  # an answer that has ended at once
        if not before < end <= len(response):
            return (
                f"step {number} ends after {end} characters, where it must be more than {before} and at most "
                f"{len(response)}, the length of the answer"
            )
        before = end
    return None


def step_tokens(steps: Steps, response: str, answer: Sequence[int], tokenizer: Any) -> list[int]:
    """The position in ``answer`` (the ids as sampled, with the end token) of the last token of each step.

    A step whose end lies inside a token ends with that token; one in the middle of a letter of several tokens with the last of
    these. Raises ``ValueError`` where no token has the end.
    """

    def text(count: int) -> str:
        decoded: str = tokenizer.decode(answer[:count], skip_special_tokens=True)
        return decoded

    positions = []
    for end, _ in steps:
        if end == len(response):
            positions.append(len(answer) - 1)
            continue
        count = bisect_left(range(len(answer) + 1), end, key=lambda tokens: len(text(tokens)))
        while count <= len(answer) and not text(count).startswith(response[:end]):
            count += 1  # so far the ids hold a part of a letter
        if count > len(answer):
            raise ValueError(f"no token of the answer ends after its first {end} characters, {response[:end][-20:]!r}")
        positions.append(count - 1)
    return positions
