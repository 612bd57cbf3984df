"""Estimate the KL divergence between the policy and its reference, and control the coefficient of the penalty.

The samples come from the policy, so with ``r = log p - log p_ref`` k1 and k3 are unbiased estimates of KL(p || p_ref), in
nats (Schulman, "Approximating KL divergence", 2020).

Invariants:

- An estimate is 0 where the two log-probs are equal, and tokens outside the action mask have no influence.
- A controller never changes: ``update`` returns the next one, and ``state`` is all that a checkpoint must hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import expect_shape, keep, segment_sum

KlEstimator = Literal["k1", "k2", "k3"]


def kl_k1(log_probs: Float[Tensor, "*N"], reference: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return ``r``: unbiased, of high variance, can be negative."""
    return log_probs - reference


def kl_k2(log_probs: Float[Tensor, "*N"], reference: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return ``r^2 / 2``: biased, of low variance; its expected gradient is that of the KL."""
    return 0.5 * (log_probs - reference).square()


def kl_k3(log_probs: Float[Tensor, "*N"], reference: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return ``exp(-r) - 1 + r``: unbiased, of low variance, never negative; expm1 keeps a small ``r`` exact."""
    log_ratio = log_probs - reference
    return torch.expm1(-log_ratio) + log_ratio


_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def token_kl(
    log_probs: Float[Tensor, "N"],
    reference: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    estimator: KlEstimator = "k1",
) -> Float[Tensor, "N"]:
    """Return the estimate at each action, and 0 at every other token.

    Raises ``ValueError`` for an unknown estimator and for shapes that differ.
    """
    expect_shape("reference log_probs", reference, log_probs.shape)
    if estimator not in _ESTIMATORS:
        raise ValueError(f"KL estimator {estimator!r} is unknown: use one of {', '.join(_ESTIMATORS)}")
    return _ESTIMATORS[estimator](keep(log_probs, action_mask), keep(reference, action_mask))


def sequence_kl(
    log_probs: Float[Tensor, "N"],
    reference: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    offsets: Int64[Tensor, "cuts"],
    estimator: KlEstimator = "k1",
) -> Float[Tensor, "cuts-1"]:
    """Sum the estimate over each sequence's actions, in nats."""
    return segment_sum(token_kl(log_probs, reference, action_mask, estimator), offsets)


KlGradient = Literal["unbiased", "plain"]


def kl_loss(
    log_probs: Float[Tensor, "N"],
    log_ratio: Float[Tensor, "N"],
    reference: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    *,
    estimator: KlEstimator,
    gradient: KlGradient,
) -> Float[Tensor, "N"]:
    """Return the estimate at each action as a term of the policy loss; ``log_ratio`` compares with the policy that sampled.

    ``plain`` is the estimator with its own gradient, which for k3 is not that of the KL and for k1 is 0 on average. With
    ``unbiased`` the value is ``w k`` and the gradient ``w r grad log p``, where ``w = p / p_old`` is taken as a number. Its
    expectation over the old policy's samples is the gradient of KL(p || p_ref) of the token after those before it,
    ``E_p[r grad log p]``. That the token changes which states come later, and their KL, is left out. For k3 this equals
    differentiating ``w k3``, sample by sample (DeepSeek-V3.2; TRL's ``use_bias_correction_kl``).
    """
    estimate = token_kl(log_probs, reference, action_mask, estimator)
    if gradient == "plain":
        return estimate
    if gradient != "unbiased":
        raise ValueError(f"KL gradient {gradient!r} is unknown: use unbiased or plain")
    kept = keep(log_probs, action_mask)
    weight = log_ratio.detach().exp()
    distance = (kept - keep(reference, action_mask)).detach()
    # kept - kept.detach() is 0, with the gradient of log p: it adds the gradient and leaves the value as it is
    return weight * (estimate.detach() + distance * (kept - kept.detach()))


@dataclass(frozen=True)
class FixedKl:
    """A coefficient that stays as it is."""

    coefficient: float

    def update(self, kl: float, n: int) -> FixedKl:
        """Return the controller itself, whatever the KL was."""
        return self

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"coefficient": self.coefficient}

    def restored(self, state: Mapping[str, float]) -> FixedKl:
        """Return the controller itself: the coefficient is the config's, not the checkpoint's."""
        return self


@dataclass(frozen=True)
class AdaptiveKl:
    """A coefficient that steers the KL towards a target (Ziegler et al. 2019, section 2.2).

    ``coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``, the target in nats per sequence, the horizon in
    sequences. Raises ``ValueError`` where one of the three is not a positive finite number.
    """

    coefficient: float
    target: float
    horizon: int

    def __post_init__(self) -> None:
        for name, value in (("coefficient", self.coefficient), ("target", self.target), ("horizon", self.horizon)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"adaptive KL control needs a positive {name}, not {value}")

    def update(self, kl: float, n: int) -> AdaptiveKl:
        """Return the controller after ``n`` sequences of mean KL ``kl`` nats; a KL that is not finite teaches nothing.

        One step counts as one horizon at most, so that the coefficient stays positive.
        """
        if not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1.0 + error * min(n / self.horizon, 1.0)))

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"coefficient": self.coefficient}

    def restored(self, state: Mapping[str, float]) -> AdaptiveKl:
        """Return the controller as it was when ``state`` was taken; target and horizon are the config's."""
        return replace(self, coefficient=state["coefficient"])


def kl_controller(coefficient: float, target: float | None, horizon: int) -> FixedKl | AdaptiveKl:
    """Return adaptive control towards ``target`` nats a sequence, or a fixed coefficient without a target."""
    return FixedKl(coefficient) if target is None else AdaptiveKl(coefficient, target, horizon)
