"""The losses of policies: an objective on the ratio to the policy that sampled, a weight for every action, KL and entropy.

Always true: what :mod:`rlhf_ray.algorithms.losses` promises of every loss; and with log-probs equal to those before the
update the ratio is exactly 1 at every level, so that nothing is clipped and the gradient is that of REINFORCE. Each part
(level of the ratio, objective, aggregation, KL term) is chosen by itself: an algorithm is a choice of parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.kl import KlEstimator, KlGradient, kl_loss
from rlhf_ray.algorithms.losses import LossOutput, Metrics, PolicyOutputs, entropy_of, metric
from rlhf_ray.algorithms.masked import count_actions, expect_shape, keep, segment_sum, sequence_of_token
from rlhf_ray.trajectories.batch import TrajectoryBatch

MAX_LOG_RATIO = 20.0
"""exp overflows float32 at 88; a ratio beyond e^20 is cut there and gives no gradient (as OpenRLHF)."""

RatioLevel = Literal["token", "sequence", "trajectory"]
Aggregation = Literal["tokens", "sequences", "constant"]


@runtime_checkable
class Objective(Protocol):
    """What is maximised at each action, and at which actions the bound on the ratio takes its gradient."""

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]: ...


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7): ``min(r A, clip(r, 1 - low, 1 + high) A)``.

    ``high`` above ``low`` gives DAPO's wider upper bound. ``dual`` c > 1 holds the objective of a negative advantage at
    ``c A`` or above (Ye et al. 2020; TRL's ``delta``).
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
        """The objective, and where the clipped side is the smaller one."""
        ratio = log_ratio.exp()
        unclipped = ratio * advantages
        clipped = ratio.clamp(1.0 - self.low, 1.0 + self.high) * advantages
        objective = torch.minimum(unclipped, clipped)
        if self.dual is not None:
            objective = torch.where(advantages < 0, torch.maximum(objective, self.dual * advantages), objective)
        return objective, clipped < unclipped


@dataclass(frozen=True)
class Cispo:
    """Clipped importance sampling (MiniMax-M1, 2025): ``sg(clip(r, 1 - low, 1 + high)) A log p``.

    Every action keeps its gradient; only its weight is bounded. Without ``low`` only from above, as published.
    """

    low: float | None
    high: float

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """The objective, and where the weight is at a bound."""
        ratio = log_ratio.detach().exp()
        weight = ratio.clamp(None if self.low is None else 1.0 - self.low, 1.0 + self.high)
        return weight * advantages * log_probs, weight != ratio


@dataclass(frozen=True)
class KlTerm:
    """``coefficient`` times the KL to the reference, inside the loss (:func:`~rlhf_ray.algorithms.kl.kl_loss`)."""

    coefficient: float
    estimator: KlEstimator
    gradient: KlGradient = "unbiased"


@dataclass(frozen=True)
class PolicyLoss:
    """``-sum_t a_t (w_t objective_t - coefficient KL_t + entropy_coefficient H_t)`` over the actions of a micro-batch.

    ``ratio``: of each ``token``; of a ``sequence``, the geometric mean of its tokens' (GSPO, Zheng et al. 2025); of a
    ``trajectory``, their product (RLOO as TRL has it). ``aggregation`` decides a_t: ``tokens``, all actions alike (DAPO);
    ``sequences``, one over the actions of the answer, so that answers weigh alike (GRPO); ``constant``, one over
    ``constant_tokens``, so that nothing depends on lengths (Dr. GRPO). w_t is the column ``importance_weights``, 1 where
    there is none.

    Needs the columns ``log_probs`` (of the weights before the update), ``advantages``, ``action_mask``, and with a KL term
    ``reference_log_probs``.
    """

    objective: Objective
    ratio: RatioLevel = "token"
    aggregation: Aggregation = "tokens"
    constant_tokens: int = 1
    entropy_coefficient: float = 0.0
    kl: KlTerm | None = None

    @property
    def denominator(self) -> DenominatorKind:
        """What the sum is divided by."""
        return "tokens" if self.aggregation == "tokens" else "answers"

    def with_kl_coefficient(self, coefficient: float) -> PolicyLoss:
        """The loss at another KL coefficient; the same loss where it has no KL term."""
        return self if self.kl is None else replace(self, kl=replace(self.kl, coefficient=coefficient))

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum over the actions of the micro-batch."""
        mask, offsets = micro_batch["action_mask"], micro_batch.offsets
        expect_shape("log_probs of the policy", outputs.log_probs, mask.shape)
        log_probs = keep(outputs.log_probs, mask)
        token_log_ratio = log_probs - keep(micro_batch["log_probs"], mask)
        log_ratio = ratio_at(self.ratio, token_log_ratio, mask, offsets).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
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
        entropy = entropy_of(outputs, mask, needed=self.entropy_coefficient != 0.0)
        if entropy is not None:
            metrics["entropy"] = metric(entropy.sum(), mask.sum())
            loss = loss - self.entropy_coefficient * (share * entropy).sum()
        return LossOutput(loss, metrics)

    def _shares(self, mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]) -> Float[Tensor, "N"]:
        """What each action's term weighs in the sum; 0 at other tokens."""
        if self.aggregation == "tokens":
            return mask.float()
        if self.aggregation == "constant":
            return mask.float() / self.constant_tokens
        if self.aggregation != "sequences":
            raise ValueError(f"aggregation {self.aggregation!r} is unknown: use tokens, sequences or constant")
        count = count_actions(mask, offsets).clamp(min=1)
        return mask.float() / count[sequence_of_token(offsets)]

    def _kl(
        self, term: KlTerm, outputs: PolicyOutputs, log_ratio: Float[Tensor, "N"], micro_batch: TrajectoryBatch
    ) -> Float[Tensor, "N"]:
        reference, mask = micro_batch["reference_log_probs"], micro_batch["action_mask"]
        return kl_loss(outputs.log_probs, log_ratio, reference, mask, estimator=term.estimator, gradient=term.gradient)


def ratio_at(
    level: RatioLevel, log_ratio: Float[Tensor, "N"], mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]
) -> Float[Tensor, "N"]:
    """The log-ratio of each action's unit, at each action: its own, or the mean or sum over its sequence's actions."""
    if level == "token":
        return log_ratio
    if level not in ("sequence", "trajectory"):
        raise ValueError(f"ratio {level!r} is unknown: use token, sequence or trajectory")
    of_sequence = segment_sum(log_ratio, offsets)
    if level == "sequence":
        of_sequence = of_sequence / count_actions(mask, offsets).clamp(min=1)
    return keep(of_sequence[sequence_of_token(offsets)], mask)


def _ratio_metrics(log_ratio: Tensor, token_log_ratio: Tensor, clipped: Tensor, mask: Tensor) -> Metrics:
    """How far the policy has moved since the log-probs were taken; the KL is Schulman's k3 of each token's ratio."""
    count, log_ratio, moved = mask.sum(), log_ratio.detach(), token_log_ratio.detach()
    moved = moved.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "ratio/mean": (keep(log_ratio.exp(), mask).sum(), count),
        "clip_fraction": ((clipped & mask).sum(), count),
        "approximate_kl": ((torch.expm1(moved) - moved).sum(), count),
    }
