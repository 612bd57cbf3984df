"""Weights that correct for the difference between the engine that sampled and the trainer that learns.

The rollout engine and the trainer compute the log-probs of the same weights with different kernels and precisions, so the
samples are off-policy from the first update on (Yao et al. 2025). The policy loss of each action is weighed by
``w = p_trainer / p_rollout`` within bounds: ``truncate`` cuts w at the bounds (TIS), ``mask`` drops actions outside them
(IcePop, MIS).

Invariants:

- The log-probs are those from before the update, so w carries no gradient and stays the same during a step's updates.
- Equal log-probs give exactly 1. At a token that is not an action the weight is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import count_actions, expect_shape, keep, masked_mean, segment_sum, sequence_of_token

MAX_LOG_WEIGHT = 20.0
"""The exponent is cut at ±20 nats: exp overflows float32 at 88."""


@dataclass(frozen=True)
class ImportanceCorrection:
    """How actions are weighed.

    ``level``: ``token`` weighs each action by its own ratio, ``sequence`` all actions of an answer by the product of its
    ratios (as TRL's ``sequence_*`` modes), ``none`` all by 1. ``rule``, ``low`` and ``high`` bound the weights.
    """

    level: Literal["none", "token", "sequence"]
    rule: Literal["truncate", "mask"] = "truncate"
    low: float = 0.0
    high: float = 2.0

    def __call__(
        self,
        log_probs: Float[Tensor, "N"],
        rollout_log_probs: Float[Tensor, "N"],
        action_mask: Bool[Tensor, "N"],
        offsets: Int64[Tensor, "cuts"],
    ) -> tuple[Float[Tensor, "N"], dict[str, float]]:
        """Return the weights and their metrics. Raises ``ValueError`` where shapes differ or the level is unknown."""
        expect_shape("rollout_log_probs", rollout_log_probs, log_probs.shape)
        log_ratio = keep(log_probs, action_mask) - keep(rollout_log_probs, action_mask)
        metrics = {
            "rollout/kl": masked_mean(torch.expm1(log_ratio) - log_ratio, action_mask),
            "rollout/log_prob_difference_mean": masked_mean(log_ratio.abs(), action_mask),
        }
        weights = self._weights(log_ratio, action_mask, offsets)
        bounded = weights.clamp(self.low, self.high)
        outside = (weights < self.low) | (weights > self.high)
        if self.rule == "mask":
            bounded = torch.where(outside, torch.zeros_like(weights), weights)
        bounded = keep(bounded, action_mask)
        metrics |= {
            "importance/mean": masked_mean(bounded, action_mask),
            "importance/largest": keep(weights, action_mask).max() if len(weights) else torch.zeros(()),
            "importance/limited_share": masked_mean(outside.float(), action_mask),
            "importance/effective_share": _effective_share(bounded, action_mask),
        }
        return bounded, {name: float(value) for name, value in metrics.items()}

    def _weights(
        self, log_ratio: Float[Tensor, "N"], action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]
    ) -> Float[Tensor, "N"]:
        if self.level == "none":
            return torch.ones_like(log_ratio)
        if self.level == "sequence":
            log_ratio = segment_sum(log_ratio, offsets)[sequence_of_token(offsets, len(log_ratio))]
        elif self.level != "token":
            raise ValueError(f"level {self.level!r} is unknown: use none, token or sequence")
        return log_ratio.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()


def _effective_share(weights: Float[Tensor, "N"], action_mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """Return Kish's effective sample size as a share of the actions: 1 where all weigh the same, 0 where none counts."""
    total, squares = weights.sum(), weights.square().sum()
    return torch.where(squares > 0, total.square() / (squares * action_mask.sum().clamp(min=1)), 0.0)


def trained_actions(
    action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"], kept: Bool[Tensor, "cuts-1"]
) -> Bool[Tensor, "N"]:
    """Mask the actions of sequences that are not ``kept``: such an answer has no loss and is in no denominator."""
    expect_shape("kept", kept, count_actions(action_mask, offsets).shape)
    return action_mask & kept[sequence_of_token(offsets, len(action_mask))]
