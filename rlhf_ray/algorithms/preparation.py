"""Prepare a scored batch for its updates: compute token rewards, advantages, returns and importance weights.

The order: shape the scores (:mod:`~rlhf_ray.algorithms.shaping`), place them on tokens, subtract the KL penalty, whiten the
token rewards, estimate advantages, whiten the advantages. Whitening covers all actions of the batch, never a micro-batch.

Invariants:

- The reward of a turn of an environment, or of a step of an answer, stands at its last action, unless scores are spread.
- The batch that is handed in does not change. The one that comes back has the columns ``token_rewards``, ``advantages`` and
  ``importance_weights``, and with a critic ``returns``, all of them 0 at every token that is not an action.
- A NaN in a score, a log-prob or a value at an action reaches the advantages, so that the ranks vote against the update
  instead of hiding it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ray.algorithms.advantages import Estimator
from rlhf_ray.algorithms.group_baselines import without_signal
from rlhf_ray.algorithms.importance import ImportanceCorrection, trained_actions
from rlhf_ray.algorithms.kl import KlEstimator, sequence_kl, token_kl
from rlhf_ray.algorithms.masked import count_actions, keep, masked_mean, segment_sum, whiten
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.shaping import RewardShaping
from rlhf_ray.algorithms.token_rewards import Placement, make_token_rewards, place_scores
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason

Whitening = Literal["none", "population", "unbiased"]
"""``population`` divides the variance by n (Ziegler et al. 2019, N+, OpenRLHF), ``unbiased`` by n - 1 (TRL)."""

Numbers = dict[str, float]
"""Metrics by name."""


@dataclass(frozen=True)
class Preparation:
    """The parts of an algorithm that work on the whole batch of a step, before its updates."""

    shaping: RewardShaping
    estimator: Estimator
    importance: ImportanceCorrection | None
    """None where the log-probs before the update are those of the rollout: there is nothing to compare and to correct."""
    kl_penalty: KlEstimator | None = None
    """The estimator of the KL in the token rewards; None where the KL is in the loss or nowhere."""
    placement: Placement = "last_action"
    whiten_rewards: Whitening = "none"
    """Whitening of the token rewards, which keeps their mean (N+, detail 26)."""
    whiten_advantages: Whitening = "none"
    leave_out_truncated: bool = False
    """Whether answers that did not end by themselves have no loss; they still move baselines and whitening."""

    def __call__(
        self, batch: TrajectoryBatch, *, kl_coefficient: float, moments: RunningMoments
    ) -> tuple[TrajectoryBatch, Numbers]:
        """Return the batch with the columns that the losses need, and the metrics of the rewards and advantages.

        Raises :class:`MissingColumnError` where the batch lacks a column.
        """
        batch.require("action_mask", "score", "finish_reason", "log_probs", "rollout_log_probs", *self.estimator.needs)
        mask, offsets = batch["action_mask"], batch.offsets
        score = self.shaping(batch["score"], batch["finish_reason"], count_actions(mask, offsets), moments)
        token_rewards = self._token_rewards(batch, score, kl_coefficient)
        metrics = self._metrics(batch, score, token_rewards)
        token_rewards = apply_whitening(token_rewards, mask, self.whiten_rewards, shift_mean=False)
        advantages, returns = self.estimator(batch, token_rewards)
        metrics |= _advantage_metrics(advantages, mask)
        advantages = apply_whitening(advantages, mask, self.whiten_advantages)
        batch = batch.with_columns(token_rewards=token_rewards, advantages=advantages)
        if self.importance is not None:
            weights, difference = self.importance(batch["log_probs"], batch["rollout_log_probs"], mask, offsets)
            batch = batch.with_columns(importance_weights=weights)
            metrics |= difference
        if returns is not None:
            batch = batch.with_columns(returns=returns)
            metrics |= _critic_metrics(batch["values"], returns, mask)
        return batch, metrics

    def trained(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        """Return the batch as the losses see it: the same sequences, without the actions of those that are left out."""
        if not self.leave_out_truncated:
            return batch
        ended = batch["finish_reason"] == FinishReason.STOP
        return batch.with_columns(action_mask=trained_actions(batch["action_mask"], batch.offsets, ended))

    def _token_rewards(
        self, batch: TrajectoryBatch, score: Float[Tensor, "B"], kl_coefficient: float
    ) -> Float[Tensor, "N"]:
        mask, offsets = batch["action_mask"], batch.offsets
        turns: Tensor | float = 0.0
        if "turn_rewards" in batch and self.placement == "last_action":
            turns = keep(batch["turn_rewards"], mask)
            score = score - segment_sum(turns, offsets)  # what shaping adds to a score stands at its last action
        if self.kl_penalty is None:
            return place_scores(score, mask, offsets, self.placement) + turns
        kl = token_kl(batch["log_probs"], batch["reference_log_probs"], mask, self.kl_penalty)
        return (
            make_token_rewards(score, kl, mask, offsets, kl_coefficient=kl_coefficient, placement=self.placement)
            + turns
        )

    def _metrics(self, batch: TrajectoryBatch, score: Tensor, token_rewards: Tensor) -> Numbers:
        """Average over sequences; KL in nats where there is a reference."""
        mask, offsets = batch["action_mask"], batch.offsets
        every, actions = torch.ones(len(batch), dtype=torch.bool, device=batch.device), count_actions(mask, offsets)
        stopped = (batch["finish_reason"] == FinishReason.STOP).float()
        metrics = {
            "reward/mean": masked_mean(score, every),
            "reward/std": _variance(score, every).sqrt(),
            "reward/after_kl": masked_mean(segment_sum(token_rewards, offsets), every),
            "length/response": masked_mean(actions.float(), every),
            "truncated/share": 1.0 - masked_mean(stopped, every),
        }
        if "reference_log_probs" in batch:
            for name, estimator in _KL_METRICS.items():
                kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], mask, offsets, estimator)
                metrics[name] = masked_mean(kl, every)
        if "prompt_id" in batch:
            silent = without_signal(batch["score"], batch["prompt_id"], actions > 0)
            metrics["groups/without_signal"] = masked_mean(silent.float(), every)
        return {name: float(value) for name, value in metrics.items()}


_KL_METRICS: dict[str, KlEstimator] = {"kl/k1": "k1", "kl/k3": "k3"}


def apply_whitening(
    x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], kind: Whitening, *, shift_mean: bool = True
) -> Float[Tensor, "N"]:
    """Whiten ``x`` as ``kind`` says; ``none`` returns ``x`` itself."""
    if kind == "none":
        return x
    return whiten(x, mask, unbiased=kind == "unbiased", shift_mean=shift_mean)


def _advantage_metrics(advantages: Tensor, mask: Tensor) -> Numbers:
    """Measure the advantages as they are before whitening."""
    return {
        "advantages/mean": float(masked_mean(advantages, mask)),
        "advantages/std": float(_variance(advantages, mask).sqrt()),
    }


def _critic_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> Numbers:
    """Measure how much of the variance of the returns the critic predicted; 0 where the returns do not vary."""
    variance = _variance(returns, mask)
    explained = torch.where(variance <= 1e-8, 0.0, 1.0 - _variance(returns - values, mask) / variance)
    return {
        "returns/mean": float(masked_mean(returns, mask)),
        "values/mean": float(masked_mean(values, mask)),
        "explained_variance": float(explained),
    }


def _variance(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
