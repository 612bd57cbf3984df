"""What PPO needs before its first update: token rewards, advantages and returns of a scored batch.

Always true: the batch given is not changed; the one returned has the columns ``token_rewards``, ``advantages`` and
``returns``, with 0 at every token that is no action; and the metrics are exactly those of :data:`PPO_METRICS`. A NaN in
a score, a log-prob or a value at an action reaches the advantages, so that the update is voted down, not hidden.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.kl import KlEstimator, sequence_kl, token_kl
from rlhf_ray.algorithms.masked import count_actions, masked_mean, segment_sum, whiten
from rlhf_ray.algorithms.rewards import missing_eos, shape_rewards
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason

PPO_METRICS = (
    "reward/mean",
    "reward/std",
    "reward/after_kl",
    "kl/k1",
    "advantages/mean",
    "advantages/std",
    "returns/mean",
    "values/mean",
    "explained_variance",
    "length/response",
    "truncated/share",
)


def prepare_ppo(
    batch: TrajectoryBatch,
    *,
    kl_coefficient: float,
    kl_estimator: KlEstimator,
    gamma: float,
    lam: float,
    whiten_advantages: bool,
    reward_clip: float | None,
    missing_eos_penalty: float | None,
) -> tuple[TrajectoryBatch, dict[str, float]]:
    """Clip the scores, subtract the penalties, place them, estimate advantages over the whole batch, whiten those.

    The clip comes first, so that it cannot take back the penalty for an answer without an end. Whitening covers all
    actions of the batch, never a micro-batch. Needs ``score``, ``finish_reason``, ``log_probs``,
    ``reference_log_probs``, ``values`` and ``action_mask``; reads ``bootstrap_value`` where it is there.
    """
    batch.require("action_mask", "score", "finish_reason", "log_probs", "reference_log_probs", "values")
    mask, values = batch["action_mask"], batch["values"]
    score = batch["score"] if reward_clip is None else batch["score"].clamp(-reward_clip, reward_clip)
    if missing_eos_penalty is not None:
        score = missing_eos(score, batch["finish_reason"], missing_eos_penalty)
    kl = token_kl(batch["log_probs"], batch["reference_log_probs"], mask, kl_estimator)
    token_rewards = shape_rewards(score, kl, mask, batch.offsets, kl_coefficient=kl_coefficient)
    bootstrap = {"bootstrap_value": batch["bootstrap_value"]} if "bootstrap_value" in batch else {}
    advantages, returns = gae(token_rewards, values, mask, batch.offsets, gamma=gamma, lam=lam, **bootstrap)
    metrics = _metrics(batch, token_rewards, advantages, returns)
    if whiten_advantages:
        advantages = whiten(advantages, mask)
    return batch.with_columns(token_rewards=token_rewards, advantages=advantages, returns=returns), metrics


def _metrics(batch: TrajectoryBatch, token_rewards: Tensor, advantages: Tensor, returns: Tensor) -> dict[str, float]:
    """Means over sequences or actions; the advantages are those before whitening, the KL is k1 in nats."""
    mask, offsets = batch["action_mask"], batch.offsets
    every = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
    kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], mask, offsets)
    stopped = (batch["finish_reason"] == FinishReason.STOP).float()
    metrics = {
        "reward/mean": masked_mean(batch["score"], every),
        "reward/std": _variance(batch["score"], every).sqrt(),
        "reward/after_kl": masked_mean(segment_sum(token_rewards, offsets), every),
        "kl/k1": masked_mean(kl, every),
        "advantages/mean": masked_mean(advantages, mask),
        "advantages/std": _variance(advantages, mask).sqrt(),
        "returns/mean": masked_mean(returns, mask),
        "values/mean": masked_mean(batch["values"], mask),
        "explained_variance": _explained_variance(batch["values"], returns, mask),
        "length/response": masked_mean(count_actions(mask, offsets).float(), every),
        "truncated/share": 1.0 - masked_mean(stopped, every),
    }
    return {name: float(value) for name, value in metrics.items()}


def _explained_variance(
    values: Float[Tensor, "N"], returns: Float[Tensor, "N"], mask: Bool[Tensor, "N"]
) -> Float[Tensor, ""]:
    """How much of the returns' variance the critic foresaw; 0 where the returns do not vary."""
    variance = _variance(returns, mask)
    return torch.where(variance <= 1e-8, 0.0, 1.0 - _variance(returns - values, mask) / variance)


def _variance(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
