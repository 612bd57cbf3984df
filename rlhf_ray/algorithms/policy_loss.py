"""The policy loss, put together from parts: objective, level of the ratio, aggregation, KL term and entropy bonus.

An algorithm is a choice of parts, and each part is chosen on its own.

Invariants:

- Everything that :mod:`rlhf_ray.algorithms.losses` says of a loss holds.
- With log-probs equal to those before the update the ratio is exactly 1 at every level, so that nothing is clipped and the
  gradient is that of REINFORCE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.importance import divergence
from rlhf_ray.algorithms.kl import KlEstimator, KlGradient, kl_loss
from rlhf_ray.algorithms.losses import LossOutput, Metrics, PolicyOutputs, metric, read_entropy
from rlhf_ray.algorithms.masked import count_actions, expect_shape, keep, segment_sum, sequence_of_token
from rlhf_ray.trajectories.batch import TrajectoryBatch

MAX_LOG_RATIO = 20.0
"""The log-ratio is cut at ±20 nats and gives no gradient beyond (as in OpenRLHF): exp overflows float32 at 88."""

RatioLevel = Literal["token", "sequence", "trajectory"]
Aggregation = Literal["tokens", "sequences", "constant"]


@runtime_checkable
class Objective(Protocol):
    """Computes what is maximised at each action, and where a bound on the ratio takes the gradient away.

    ``log_probs``, ``log_ratio`` and ``advantages`` are 0 at tokens that are not actions.
    """

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]: ...


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7): ``min(r A, clip(r, 1 - low, 1 + high) A)``.

    ``high`` above ``low`` gives DAPO's wider upper bound. ``dual`` c > 1 keeps the objective of a negative advantage at
    ``c A`` or above (Ye et al. 2020; TRL's ``delta``). Raises ``ValueError`` for a ``dual`` of 1 or less.
    """

    low: float
    high: float
    dual: float | None = None

    def __post_init__(self) -> None:
        if self.dual is not None and self.dual <= 1.0:
            raise ValueError(f"dual is {self.dual}, but it bounds ratios above 1: use a number above 1")

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """Return the objective, and where the clipped side is the smaller one."""
        ratio = log_ratio.exp()
        unclipped = ratio * advantages
        clipped = ratio.clamp(1.0 - self.low, 1.0 + self.high) * advantages
        objective = torch.minimum(unclipped, clipped)
        if self.dual is not None:
            objective = torch.where(advantages < 0, torch.maximum(objective, self.dual * advantages), objective)
        return objective, clipped < unclipped


@dataclass(frozen=True)
class Cispo:
    """Clipped importance sampling (MiniMax-M1, 2025): ``sg(clip(r, 1 - low, 1 + high)) A log p``, sg for no gradient.

    Every action keeps its gradient; only its weight is bounded, and without ``low`` only from above, as published.
    """

    low: float | None
    high: float

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """Return the objective, and where the weight is at a bound."""
        ratio = log_ratio.detach().exp()
        weight = ratio.clamp(None if self.low is None else 1.0 - self.low, 1.0 + self.high)
        return weight * advantages * log_probs, weight != ratio


@dataclass(frozen=True)
class Dppo:
    """Divergence proximal policy optimisation (Qi et al. 2026, arXiv 2602.04879, eq. 12): ``sg(m min(r, cap)) A log p``.

    The gate m is 0 where the gradient would take a token further away that is too far already: where A > 0, the token has
    become more likely, and the divergence (:func:`~rlhf_ray.algorithms.importance.divergence`, in nats for ``binary_kl``, at
    most 1 for ``tv``) of the policy from the one before the update is above ``high``; and where A <= 0, it has become less
    likely, and the divergence is above ``low``. Else m is 1. A rare token may so change its ratio freely, and a likely one may
    not. ``cap`` bounds the weight (section 5.4); None leaves it. As verl 0.9's ``dppo_tv`` and ``dppo_kl``; prime-rl's default
    loss has the gate of ``tv``.
    """

    kind: Literal["tv", "binary_kl"]
    low: float
    high: float
    cap: float | None = None

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """Return the objective, and where the gate takes the gradient away."""
        now, moved = log_probs.detach(), log_ratio.detach()
        apart = divergence(self.kind, now, now - moved)
        gated = torch.where(advantages > 0, (apart > self.high) & (moved > 0), (apart > self.low) & (moved < 0))
        weight = torch.where(gated, 0.0, moved.exp().clamp(max=torch.inf if self.cap is None else self.cap))
        return weight * advantages * log_probs, gated


@dataclass(frozen=True)
class KlTerm:
    """``coefficient`` times the KL to the reference, as a term of the loss (:func:`~rlhf_ray.algorithms.kl.kl_loss`)."""

    coefficient: float
    estimator: KlEstimator
    gradient: KlGradient = "unbiased"


@dataclass(frozen=True)
class PolicyLoss:
    """``-sum_t a_t (w_t objective_t - coefficient KL_t + entropy_coefficient H_t)`` over the actions of a micro-batch.

    ``ratio`` is taken of each ``token``; of a ``sequence``, as the geometric mean of its tokens' ratios (GSPO, Zheng et al.
    2025); or of a ``trajectory``, as their product (RLOO in TRL's form). ``aggregation`` decides a_t: with ``tokens`` all
    actions weigh the same (DAPO); with ``sequences`` a_t is one over the number of actions of the answer, so that all answers
    weigh the same (GRPO); with ``constant`` it is one over ``constant_tokens``, so that nothing depends on lengths (Dr. GRPO).
    w_t is the column ``importance_weights``, or 1 without that column.

    Needs the columns ``log_probs`` (of the weights before the update), ``advantages`` and ``action_mask``, and with a KL term
    ``reference_log_probs``. Raises ``ValueError`` for an unknown part and for shapes that differ.
    """

    objective: Objective
    ratio: RatioLevel = "token"
    aggregation: Aggregation = "tokens"
    constant_tokens: int = 1
    entropy_coefficient: float = 0.0
    kl: KlTerm | None = None

    @property
    def denominator(self) -> DenominatorKind:
        """What the sum must be divided by."""
        return "tokens" if self.aggregation == "tokens" else "answers"

    def with_kl_coefficient(self, coefficient: float) -> PolicyLoss:
        """Return the loss with another KL coefficient, or the same loss where it has no KL term."""
        return self if self.kl is None else replace(self, kl=replace(self.kl, coefficient=coefficient))

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the actions of the micro-batch."""
        mask, offsets = micro_batch["action_mask"], micro_batch.offsets
        expect_shape("log_probs of the policy", outputs.log_probs, mask.shape)
        log_probs = keep(outputs.log_probs, mask)
        token_log_ratio = log_probs - keep(micro_batch["log_probs"], mask)
        log_ratio = spread_ratio(self.ratio, token_log_ratio, mask, offsets).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        objective, clipped = self.objective(log_probs, log_ratio, keep(micro_batch["advantages"], mask))
        if "importance_weights" in micro_batch:
            objective = objective * keep(micro_batch["importance_weights"], mask)
        share = self._shares(mask, offsets)
        count = mask.sum() if self.aggregation == "tokens" else (count_actions(mask, offsets) > 0).sum()
        loss = policy = -(share * objective).sum()  # outside the mask the advantage is 0, and so is the objective
        metrics = {"loss/policy": metric(policy, count), **_ratio_metrics(log_ratio, token_log_ratio, clipped, mask)}
        if self.kl is not None:
            kl = self._kl(self.kl, outputs, log_ratio, micro_batch)
            loss = loss + self.kl.coefficient * (share * kl).sum()
            metrics["loss/kl"] = metric((share * kl).sum(), count)
        entropy = read_entropy(outputs, mask, needed=self.entropy_coefficient != 0.0)
        if entropy is not None:
            metrics["entropy"] = metric(entropy.sum(), mask.sum())
        if entropy is not None and self.entropy_coefficient != 0.0:  # at 0 the head is spared the entropy's gradient
            loss = loss - self.entropy_coefficient * (share * entropy).sum()
        return LossOutput(loss, metrics)

    def _shares(self, mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]) -> Float[Tensor, "N"]:
        """Return the weight of each action in the sum; 0 at other tokens."""
        if self.aggregation == "tokens":
            return mask.float()
        if self.aggregation == "constant":
            return mask.float() / self.constant_tokens
        if self.aggregation != "sequences":
            raise ValueError(f"aggregation {self.aggregation!r} is unknown: use tokens, sequences or constant")
        count = count_actions(mask, offsets).clamp(min=1)
        return mask.float() / count[sequence_of_token(offsets, len(mask))]

    def _kl(
        self, term: KlTerm, outputs: PolicyOutputs, log_ratio: Float[Tensor, "N"], micro_batch: TrajectoryBatch
    ) -> Float[Tensor, "N"]:
        reference, mask = micro_batch["reference_log_probs"], micro_batch["action_mask"]
        return kl_loss(outputs.log_probs, log_ratio, reference, mask, estimator=term.estimator, gradient=term.gradient)


def spread_ratio(
    level: RatioLevel, log_ratio: Float[Tensor, "N"], mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]
) -> Float[Tensor, "N"]:
    """Return at each action the log-ratio of its level: its own, or the mean or the sum over the actions of its sequence."""
    if level == "token":
        return log_ratio
    if level not in ("sequence", "trajectory"):
        raise ValueError(f"ratio {level!r} is unknown: use token, sequence or trajectory")
    of_sequence = segment_sum(log_ratio, offsets)
    if level == "sequence":
        of_sequence = of_sequence / count_actions(mask, offsets).clamp(min=1)
    return keep(of_sequence[sequence_of_token(offsets, len(mask))], mask)


def _ratio_metrics(log_ratio: Tensor, token_log_ratio: Tensor, clipped: Tensor, mask: Tensor) -> Metrics:
    """Measure how far the policy has moved since the log-probs were taken; the KL is Schulman's k3 of each token's ratio."""
    count, log_ratio, moved = mask.sum(), log_ratio.detach(), token_log_ratio.detach()
    moved = moved.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "ratio/mean": (keep(log_ratio.exp(), mask).sum(), count),
        "clip_fraction": ((clipped & mask).sum(), count),
        "approximate_kl": ((torch.expm1(moved) - moved).sum(), count),
    }
