"""Shape the score of each answer before it becomes token rewards, in one fixed order.

Invariants:

- The order is: normalise, scale, clip, penalise lengths, apply the rule for a missing end. So a clip never takes a penalty
  back, and ``replace`` has the last word.
- A NaN stays NaN, except where ``replace`` overwrites the score of an answer that did not end by itself.
- Every step is a pure function of its arguments. The moments of a run are kept by the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import expect_shape
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.trajectories.columns import FinishReason

Normalization = Literal["none", "running", "running_scale"]
EosRule = Literal["subtract", "replace", "scale"]


@dataclass(frozen=True)
class MissingEos:
    """The rule for the score of an answer that did not end by itself.

    ``subtract`` subtracts ``value`` (TRL); ``replace`` sets the score to it (N+, Huang et al. 2024; torchtune); ``scale``
    multiplies by it (ProRL's stop penalty).
    """

    rule: EosRule
    value: float

    def __call__(self, score: Float[Tensor, "B"], finish_reason: Int8[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Apply the rule. Raises ``ValueError`` where shapes differ or the rule is unknown."""
        expect_shape("finish_reason", finish_reason, score.shape)
        if self.rule == "subtract":
            changed = score - self.value
        elif self.rule == "replace":
            changed = torch.full_like(score, self.value)
        elif self.rule == "scale":
            changed = score * self.value
        else:
            raise ValueError(f"rule {self.rule!r} is unknown: use subtract, replace or scale")
        return torch.where(finish_reason == FinishReason.STOP, score, changed)


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment of long answers (Yu et al. 2025, eq. 13).

    It grows from 0 to ``penalty`` over the last ``buffer`` of ``limit`` tokens.
    """

    limit: int
    buffer: int
    penalty: float

    def __call__(self, score: Float[Tensor, "B"], tokens: Int64[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return ``score - penalty * clip(tokens - (limit - buffer), 0, buffer) / buffer``."""
        expect_shape("tokens", tokens, score.shape)
        beyond = (tokens - (self.limit - self.buffer)).clamp(min=0, max=self.buffer)
        return score - self.penalty * (beyond / self.buffer)


@dataclass(frozen=True)
class TooShort:
    """A penalty for answers of fewer than ``tokens`` tokens (as torchtune's ``min_response_length``, but subtracted)."""

    tokens: int
    penalty: float

    def __call__(self, score: Float[Tensor, "B"], tokens: Int64[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Subtract the penalty where the answer is too short."""
        expect_shape("tokens", tokens, score.shape)
        return torch.where(tokens < self.tokens, score - self.penalty, score)


@dataclass(frozen=True)
class RewardShaping:
    """All steps in their order; one that is not set does nothing."""

    normalize: Normalization = "none"
    """``running``: ``(s - mean) / deviation`` over the run so far; ``running_scale``: ``s / deviation``."""
    scale: float = 1.0
    clip: float | None = None
    overlong: Overlong | None = None
    too_short: TooShort | None = None
    missing_eos: MissingEos | None = None

    def __call__(
        self,
        score: Float[Tensor, "B"],
        finish_reason: Int8[Tensor, "B"],
        tokens: Int64[Tensor, "B"],
        moments: RunningMoments,
    ) -> Float[Tensor, "B"]:
        """Return the shaped scores; ``tokens`` counts the actions of each answer."""
        if self.normalize != "none":
            score = (score - (moments.mean if self.normalize == "running" else 0.0)) / (moments.deviation + 1e-8)
        score = score * self.scale
        if self.clip is not None:
            score = score.clamp(-self.clip, self.clip)
        if self.overlong is not None:
            score = self.overlong(score, tokens)
        if self.too_short is not None:
            score = self.too_short(score, tokens)
        if self.missing_eos is not None:
            score = self.missing_eos(score, finish_reason)
        return score
