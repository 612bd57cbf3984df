"""The implicit reward of an answer: what a policy that is trained on preferences directly is itself the reward model of.

Invariants: only the tokens in ``action_mask`` count; everything is added up in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import count_actions, expect_shape, keep, segment_sum
from rlhf_ray.trajectories.batch import TrajectoryBatch

REFERENCE = "reference_log_prob"
"""The column with the log-probability of each answer under the reference."""


@dataclass(frozen=True)
class ImplicitReward:
    """``beta (log p - log p_reference)`` of an answer (Rafailov et al. 2023, eq. 5, without the part that pairs cancel).

    With ``length_normalised`` it is divided by the number of the answer's tokens (Meng et al. 2024, eq. 3). Without
    ``reference`` the second term is left out (the same, eq. 4).
    """

    beta: float
    length_normalised: bool = False
    reference: bool = True

    def __call__(self, log_prob: Float[Tensor, "B"], batch: TrajectoryBatch) -> Float[Tensor, "B"]:
        """Return the reward of each answer, given its log-probability in nats. Reads ``REFERENCE`` where it is used."""
        expect_shape("log-probs of answers", log_prob, (len(batch),))
        ratio = log_prob - batch[REFERENCE].to(log_prob) if self.reference else log_prob
        if self.length_normalised:
            ratio = ratio / answer_lengths(batch).clamp(min=1)
        return self.beta * ratio


def answer_log_probs(log_probs: Float[Tensor, "N"], batch: TrajectoryBatch) -> Float[Tensor, "B"]:
    """Add up the log-probabilities of each answer's tokens."""
    mask = batch["action_mask"]
    expect_shape("log_probs of the policy", log_probs, mask.shape)
    return segment_sum(keep(log_probs, mask), batch.offsets)


def answer_lengths(batch: TrajectoryBatch) -> Int64[Tensor, "B"]:
    """Count the tokens of each answer."""
    return count_actions(batch["action_mask"], batch.offsets)


def kl_baseline(log_ratios: Float[Tensor, "B"]) -> float:
    """KTO's reference point z0: the mean log-ratio of policy to reference over answers to other prompts, at least 0.

    ``log_ratios`` are in nats a sequence (Ethayarajh et al. 2024, section 4.1). No gradient flows through it.
    """
    return max(float(log_ratios.detach().to(torch.float64).mean()), 0.0)
