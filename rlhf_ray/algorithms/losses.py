"""The losses of policies and critics, each a sum over one micro-batch.

Always true: a loss is a sum, so the losses and gradients of the parts of a batch add up to those of the whole, and the
order of sequences does not matter; the caller divides by :func:`~rlhf_ray.algorithms.denominators.denominator` of
kind ``loss.denominator``, taken over the whole optimizer batch. Tokens that are no action have no influence, even
through NaN. A metric is a pair (sum, count), so that ranks and micro-batches of any size average rightly.

A loss is a frozen dataclass, so that it can be sent to another process; call it as ``loss(outputs, micro_batch)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.masked import expect_shape, keep

if TYPE_CHECKING:
    from rlhf_ray.trajectories.batch import TrajectoryBatch

MAX_LOG_RATIO = 20.0
"""exp overflows float32 at 88; a ratio beyond e^20 is cut there and gives no gradient (as OpenRLHF)."""

Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PolicyOutputs:
    """What a policy says about each token: its log-probability, and the entropy of the choice where it was asked."""

    log_probs: Float[Tensor, "N"]
    entropy: Float[Tensor, "N"] | None = None


@dataclass(frozen=True)
class LossOutput:
    """The summed loss of one micro-batch with its graph, and metrics as (sum, count) without it."""

    loss: Float[Tensor, ""]
    metrics: Metrics


@dataclass(frozen=True)
class PolicyLoss:
    """PPO's clipped objective (Schulman et al. 2017), eq. 7, negated: ``-min(r A, clip(r, 1-low, 1+high) A)``.

    ``clip_high`` above ``clip_low`` gives DAPO's wider upper bound. ``dual_clip`` c > 1 holds the objective of a
    negative advantage at ``c A`` or above (Ye et al. 2020). The entropy bonus is ``entropy_coefficient`` times the
    entropy. Needs the columns ``log_probs`` (of the weights before the update), ``advantages`` and ``action_mask``.
    """

    clip_low: float
    clip_high: float
    entropy_coefficient: float = 0.0
    dual_clip: float | None = None

    denominator: ClassVar[DenominatorKind] = "tokens"

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip is {self.dual_clip}, but it bounds ratios above 1: use a number above 1")

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum over the actions of the micro-batch."""
        mask = micro_batch["action_mask"]
        expect_shape("log_probs of the policy", outputs.log_probs, mask.shape)
        advantages = keep(micro_batch["advantages"], mask)
        log_ratio = keep(outputs.log_probs, mask) - keep(micro_batch["log_probs"], mask)
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        unclipped = ratio * advantages
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * advantages
        objective = torch.minimum(unclipped, clipped)
        if self.dual_clip is not None:
            bound = self.dual_clip * advantages
            objective = torch.where(advantages < 0, torch.maximum(objective, bound), objective)
        loss = -objective.sum()  # outside the mask the advantage is 0, and so is the objective
        metrics = {
            "loss/policy": _metric(loss, mask.sum()),
            **_ratio_metrics(log_ratio.detach(), clipped < unclipped, mask),
        }
        entropy = _entropy(outputs, micro_batch, needed=self.entropy_coefficient != 0.0)
        if entropy is not None:
            metrics["entropy"] = _metric(entropy, mask.sum())
            if self.entropy_coefficient:
                loss = loss - self.entropy_coefficient * entropy
        return LossOutput(loss, metrics)


@dataclass(frozen=True)
class ValueLoss:
    """Clipped squared error of the critic: ``0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)``.

    Needs the columns ``values`` (of the weights before the update), ``returns`` and ``action_mask``. The clipped value
    is compared as such, not as ``v_old + clip(v - v_old)``, whose rounding would count tokens as clipped that are not.
    """

    clip: float | None

    denominator: ClassVar[DenominatorKind] = "tokens"

    def __call__(self, outputs: Float[Tensor, "N"], micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum over the actions of the micro-batch."""
        mask = micro_batch["action_mask"]
        expect_shape("values of the critic", outputs, mask.shape)
        values, returns = keep(outputs, mask), keep(micro_batch["returns"], mask)
        error = (values - returns).square()
        clipped = torch.zeros_like(mask)
        if self.clip is not None:
            old = keep(micro_batch["values"], mask)
            clipped_error = (values.clamp(old - self.clip, old + self.clip) - returns).square()
            clipped = clipped_error > error
            error = torch.maximum(error, clipped_error)
        loss = 0.5 * error.sum()
        metrics = {
            "loss/value": _metric(loss, mask.sum()),
            "clip_fraction/value": _metric(clipped.sum(), mask.sum()),
        }
        return LossOutput(loss, metrics)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning: ``-log p`` of the answer's tokens. Needs the column ``action_mask``."""

    denominator: ClassVar[DenominatorKind] = "tokens"

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum over the actions of the micro-batch."""
        mask = micro_batch["action_mask"]
        expect_shape("log_probs of the policy", outputs.log_probs, mask.shape)
        loss = -keep(outputs.log_probs, mask).sum()
        metrics = {"loss/sft": _metric(loss, mask.sum())}
        entropy = _entropy(outputs, micro_batch, needed=False)
        if entropy is not None:
            metrics["entropy"] = _metric(entropy, mask.sum())
        return LossOutput(loss, metrics)


def _metric(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return total.detach(), count.detach()


def _ratio_metrics(log_ratio: Tensor, clipped: Tensor, mask: Tensor) -> Metrics:
    """How far the policy has moved since the log-probs were taken; the KL is Schulman's k3 from its samples."""
    count = mask.sum()
    return {
        "ratio/mean": (keep(log_ratio.exp(), mask).sum(), count),
        "clip_fraction": (clipped.sum(), count),
        "approximate_kl": ((torch.expm1(log_ratio) - log_ratio).sum(), count),
    }


def _entropy(outputs: PolicyOutputs, micro_batch: TrajectoryBatch, *, needed: bool) -> Tensor | None:
    if outputs.entropy is None:
        if needed:
            raise ValueError(
                "entropy_coefficient is set, but the policy gave no entropy: ask it with with_entropy=True"
            )
        return None
    expect_shape("entropy of the policy", outputs.entropy, outputs.log_probs.shape)
    return keep(outputs.entropy, micro_batch["action_mask"]).sum()
