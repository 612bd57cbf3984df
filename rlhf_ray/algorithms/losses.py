"""What every loss returns, and the losses of the critic, of supervised fine-tuning and of distillation.

A loss is a frozen dataclass, so that it can be sent to another process. It is called as ``loss(outputs, micro_batch)``.

Invariants:

- A loss is a sum: the losses and gradients of the parts of a batch add up to those of the whole, and the order of sequences
  does not matter. The caller divides by :func:`~rlhf_ray.algorithms.denominators.denominator` of kind ``loss.denominator``,
  counted over the whole update.
- Tokens that are not actions have no influence, even through NaN.
- A metric is a pair (sum, count), so that ranks and micro-batches of different sizes average correctly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

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
    divergence: Float[Tensor, "N"] | None = None
    """From a teacher, in nats, where the policy was given one."""


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


@dataclass(frozen=True)
class Divergence:
    """How far the distribution p of a policy is from the distribution q of its teacher, at one temperature.

    ``forward_kl`` is KL(q ‖ p), ``reverse_kl`` is KL(p ‖ q), and ``jsd`` the generalised Jensen-Shannon divergence
    ``beta KL(q ‖ m) + (1 - beta) KL(p ‖ m)`` with ``m = beta q + (1 - beta) p`` (Agarwal et al. 2024, eq. 1).
    """

    name: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float = 0.5
    temperature: float = 1.0

    def __call__(self, log_p: Float[Tensor, "T V"], log_q: Float[Tensor, "T V"]) -> Float[Tensor, "T"]:
        """Return the divergence of each row of log-probabilities, in nats; never below 0 but for rounding."""
        if self.name == "forward_kl":
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        if self.name == "reverse_kl":
            return (log_p.exp() * (log_p - log_q)).sum(-1)
        log_m = torch.logaddexp(log_q + math.log(self.beta), log_p + math.log1p(-self.beta))
        to_teacher, to_policy = ((one.exp() * (one - log_m)).sum(-1) for one in (log_q, log_p))
        return self.beta * to_teacher + (1.0 - self.beta) * to_policy


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher: ``(1 - likelihood) D - likelihood log p`` of the answer's tokens.

    D is the divergence of the whole distributions at a token. Needs the column ``action_mask``.
    """

    divergence: Divergence
    likelihood: float = 0.0
    """The share of the loss of supervised fine-tuning (Hinton et al. 2015)."""

    denominator: ClassVar[DenominatorKind] = "tokens"

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the actions of the micro-batch; raises ``ValueError`` where the policy had no teacher."""
        mask = micro_batch["action_mask"]
        if outputs.divergence is None:
            raise ValueError("the policy was given no teacher: its outputs have no divergence")
        expect_shape("divergence of the policy", outputs.divergence, mask.shape)
        divergence = keep(outputs.divergence, mask).sum()
        surprise = -keep(outputs.log_probs, mask).sum()
        loss = divergence
        if self.likelihood:  # else log-probs need no gradient, which takes as long as that of the divergence
            loss = (1.0 - self.likelihood) * divergence + self.likelihood * surprise
        metrics = {
            "loss/distill": metric(loss, mask.sum()),
            "divergence/teacher": metric(divergence, mask.sum()),
            "loss/sft": metric(surprise, mask.sum()),
        }
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
