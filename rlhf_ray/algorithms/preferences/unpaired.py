"""The loss of KTO, which trains a policy on single answers that are labelled as desirable or undesirable.

Invariants: everything that :mod:`rlhf_ray.algorithms.losses` says of a loss holds. The loss of an answer lies between 0 and the
weight of its label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.losses import LossOutput, PolicyOutputs, metric, read_entropy
from rlhf_ray.algorithms.preferences.rewards import ImplicitReward, answer_log_probs
from rlhf_ray.trajectories.batch import TrajectoryBatch

DESIRABLE = "desirable"
"""The column that says of each answer whether it is desirable."""


@dataclass(frozen=True)
class KtoLoss:
    """``w_d (1 - sigmoid(r - beta z0))`` of a desirable answer and ``w_u (1 - sigmoid(beta z0 - r))`` of an undesirable one.

    ``r`` is the implicit reward and ``baseline`` is z0 in nats a sequence, the same for the whole update (Ethayarajh et al.
    2024, eq. 7 and 8; see :func:`~rlhf_ray.algorithms.preferences.rewards.kl_baseline`). Needs the columns ``action_mask``,
    ``reference_log_prob`` and ``desirable``.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    baseline: float = 0.0

    denominator: ClassVar[DenominatorKind] = "sequences"

    @property
    def reward(self) -> ImplicitReward:
        """The implicit reward of an answer."""
        return ImplicitReward(self.beta)

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the answers of the micro-batch."""
        rewards = self.reward(answer_log_probs(outputs.log_probs, micro_batch), micro_batch)
        desirable = micro_batch[DESIRABLE]
        loss = self.per_answer(rewards, desirable).sum()
        answers = torch.full_like(loss.detach(), len(rewards))
        metrics = {
            "loss/kto": metric(loss, answers),
            "kl/baseline": (answers * self.baseline, answers),
            "reward/chosen": metric(rewards[desirable].sum(), desirable.sum()),
            "reward/rejected": metric(rewards[~desirable].sum(), (~desirable).sum()),
        }
        mask = micro_batch["action_mask"]
        entropy = read_entropy(outputs, mask)
        if entropy is not None:
            metrics["entropy"] = metric(entropy.sum(), mask.sum())
        return LossOutput(loss, metrics)

    def per_answer(self, rewards: Float[Tensor, "B"], desirable: Tensor) -> Float[Tensor, "B"]:
        """Return the loss of each answer, given its implicit reward and whether it is desirable."""
        above = rewards - self.beta * self.baseline
        return torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(-above),
            self.undesirable_weight * torch.sigmoid(above),
        )
