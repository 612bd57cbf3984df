"""What every loss returns, and the losses of the critic and of supervised fine-tuning.

A loss is a frozen dataclass, so that it can be sent to another process. It is called as ``loss(outputs, micro_batch)``.

Invariants:

- A loss is a sum: the losses and gradients of the parts of a batch add up to those of the whole, and the order of sequences
  does not matter. The caller divides by :func:`~rlhf_ray.algorithms.denominators.denominator` of kind ``loss.denominator``,
  counted over the whole update.
- Tokens that are not actions have no influence, even through NaN.
- A metric is a pair (sum, count), so that ranks and micro-batches of different sizes average correctly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.masked import expect_shape, keep
from rlhf_ray.trajectories.batch import TrajectoryBatch

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name, the sum over what counts and how many that are."""


@dataclass(frozen=True)
class PolicyOutputs:
    """What a policy computes for each token: its log-probability in nats, and on request the entropy of its distribution."""

    log_probs: Float[Tensor, "N"]
    entropy: Float[Tensor, "N"] | None = None


@dataclass(frozen=True)
class LossOutput:
    """The summed loss of one micro-batch with its graph for the gradient, and metrics without a graph."""

    loss: Float[Tensor, ""]
    metrics: Metrics


@dataclass(frozen=True)
class ValueLoss:
    """Clipped squared error of the critic: ``0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)``.

    ``clip`` is c; without it the second term is left out. Needs the columns ``values`` (of the weights before the update),
    ``returns`` and ``action_mask``. The value itself is clamped; ``v_old + clip(v - v_old)`` would round, and count tokens
    as clipped that are not.
    """

    clip: float | None

    denominator: ClassVar[DenominatorKind] = "tokens"

    def __call__(self, outputs: Float[Tensor, "N"], micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the actions of the micro-batch."""
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
            "loss/value": metric(loss, mask.sum()),
            "clip_fraction/value": metric(clipped.sum(), mask.sum()),
        }
        return LossOutput(loss, metrics)


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Supervised fine-tuning: ``-log p`` of the answer's tokens. Needs the column ``action_mask``."""

    denominator: ClassVar[DenominatorKind] = "tokens"

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the actions of the micro-batch."""
        mask = micro_batch["action_mask"]
        expect_shape("log_probs of the policy", outputs.log_probs, mask.shape)
        loss = -keep(outputs.log_probs, mask).sum()
        metrics = {"loss/sft": metric(loss, mask.sum())}
        entropy = read_entropy(outputs, mask)
        if entropy is not None:
            metrics["entropy"] = metric(entropy.sum(), mask.sum())
        return LossOutput(loss, metrics)


def metric(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return a metric without its graph."""
    return total.detach(), count.detach()


def read_entropy(outputs: PolicyOutputs, mask: Bool[Tensor, "N"], *, needed: bool = False) -> Float[Tensor, "N"] | None:
    """Return the entropy at each action and 0 elsewhere, or None where the policy gave none.

    Raises ``ValueError`` where it is ``needed`` and missing.
    """
    if outputs.entropy is None:
        if needed:
            raise ValueError(
                "entropy_coefficient is set, but the policy gave no entropy: ask it with with_entropy=True"
            )
        return None
    expect_shape("entropy of the policy", outputs.entropy, outputs.log_probs.shape)
    return keep(outputs.entropy, mask)
