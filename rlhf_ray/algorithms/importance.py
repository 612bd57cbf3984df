"""Weights that correct for the difference between the engine that sampled and the trainer that learns.

The rollout engine and the trainer compute the log-probs of the same weights with different kernels and precisions, so the
samples are off-policy from the first update on (Yao et al. 2025). The policy loss of each action is weighed by
``w = p_trainer / p_rollout`` within bounds: ``truncate`` cuts w at the bounds (TIS), ``mask`` drops actions outside them
(IcePop, MIS).

What is bounded may be another number than the weight (``gating``): the geometric mean of an answer's ratios, or a divergence
between both policies, which is a trust region (OpenRLHF 0.11's ``is_correction_gating``; DPPO). A divergence
is that of "this token or another one" and needs no logits but the sampled token's: with p of the rollout and q of the trainer
``p log(p / q) + (1 - p) log((1 - p) / (1 - q))`` for ``binary_kl``, ``|p - q|`` for ``tv``. Where a ratio is far from 1 though
both probabilities are tiny, they are small: such a token moves no mass.

Invariants:

- The log-probs are those from before the update, so w carries no gradient and stays the same during a step's updates.
- Equal log-probs give exactly 1 and no divergence. At a token that is not an action the weight is 0.
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
SMALLEST_PROBABILITY = 1e-6
"""A divergence is taken of probabilities in [1e-6, 1 - 1e-6], so that its logarithms stay finite (as in OpenRLHF)."""

Gating = Literal["ratio", "geometric_mean", "binary_kl", "tv"]


@dataclass(frozen=True)
class ImportanceCorrection:
    """How actions are weighed.

    ``level``: ``token`` weighs each action by its own ratio, ``sequence`` all actions of an answer by the product of its
    ratios (as TRL's ``sequence_*`` modes), ``none`` all by 1. ``rule``, ``low`` and ``high`` bound the weights.

    With another ``gating`` than ``ratio`` each action keeps the weight of its own ratio, and is dropped where the gated number
    is outside of ``low`` and ``high``: its own at level ``token``, the mean over its answer at level ``sequence``. Raises
    ``ValueError`` for such a gating with rule ``truncate``, and for ``geometric_mean`` of single tokens.
    """

    level: Literal["none", "token", "sequence"]
    rule: Literal["truncate", "mask"] = "truncate"
    low: float = 0.0
    high: float = 2.0
    gating: Gating = "ratio"

    def __post_init__(self) -> None:
        if self.gating != "ratio" and self.rule != "mask":
            raise ValueError(f"gating {self.gating} drops actions: use rule mask, not {self.rule}")
        if self.gating == "geometric_mean" and self.level == "token":
            raise ValueError("gating geometric_mean is of an answer: use level sequence, not token")

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
        gated = weights
        if self.gating != "ratio" and self.level != "none":
            gated = self._gated(
                keep(log_probs, action_mask), keep(rollout_log_probs, action_mask), action_mask, offsets
            )
        bounded = weights.clamp(self.low, self.high)
        outside = (gated < self.low) | (gated > self.high)
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
        if self.level == "sequence" and self.gating == "ratio":
            log_ratio = segment_sum(log_ratio, offsets)[sequence_of_token(offsets, len(log_ratio))]
        elif self.level not in ("token", "sequence"):
            raise ValueError(f"level {self.level!r} is unknown: use none, token or sequence")
        return log_ratio.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()

    def _gated(
        self,
        log_probs: Float[Tensor, "N"],
        rollout_log_probs: Float[Tensor, "N"],
        action_mask: Bool[Tensor, "N"],
        offsets: Int64[Tensor, "cuts"],
    ) -> Float[Tensor, "N"]:
        """Return the number that is held against the bounds at each action."""
        geometric = self.gating == "geometric_mean"
        number = log_probs - rollout_log_probs if geometric else divergence(self.gating, log_probs, rollout_log_probs)
        if self.level == "sequence":
            mean = segment_sum(keep(number, action_mask), offsets) / count_actions(action_mask, offsets).clamp(min=1)
            number = mean[sequence_of_token(offsets, len(number))]
        return number.exp() if geometric else number


def divergence(kind: str, log_probs: Float[Tensor, "N"], rollout_log_probs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Return at each token how far trainer and rollout are apart on "this token or another one".

    ``binary_kl`` is KL(rollout || trainer) in nats, ``tv`` the total variation, between 0 and 1. Raises ``ValueError`` for
    another kind.
    """
    lowest, highest = SMALLEST_PROBABILITY, 1.0 - SMALLEST_PROBABILITY
    rollout = rollout_log_probs.exp().clamp(lowest, highest)
    trainer = log_probs.exp().clamp(lowest, highest)
    if kind == "tv":
        return (rollout - trainer).abs()
    if kind != "binary_kl":
        raise ValueError(f"gating {kind!r} is unknown: use ratio, geometric_mean, binary_kl or tv")
    kl = rollout * (rollout / trainer).log() + (1.0 - rollout) * ((1.0 - rollout) / (1.0 - trainer)).log()
    return kl.clamp(min=0.0)  # rounding may leave less than 0, which a lower bound of 0 would call outside


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
