"""From one score a sequence to one reward a token.

Always true: a score lands at the last action of its sequence, where the sampled end of sequence stands if there is one;
the token rewards of a sequence add up to its score minus the coefficient times its KL; and they are 0 wherever the
policy chose nothing. A sequence without an action gets no reward.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import expect_shape, sequence_of_token
from rlhf_ray.trajectories.columns import FinishReason


def missing_eos(score: Float[Tensor, "B"], finish_reason: Int8[Tensor, "B"], penalty: float) -> Float[Tensor, "B"]:
    """Subtract ``penalty`` from the score of every answer that did not end by itself (TRL's rule; N+ overwrites)."""
    expect_shape("finish_reason", finish_reason, score.shape)
    return torch.where(finish_reason == FinishReason.STOP, score, score - penalty)


def place_scores(
    score: Float[Tensor, "B"], action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "B+1"]
) -> Float[Tensor, "N"]:
    """Put each score at the last action of its sequence, and 0 elsewhere."""
    expect_shape("score", score, (len(offsets) - 1,))
    rows = sequence_of_token(offsets)
    positions = torch.arange(len(action_mask), device=action_mask.device)
    nowhere = torch.full_like(offsets[1:], -1)
    last = nowhere.scatter_reduce(0, rows, torch.where(action_mask, positions, -1), reduce="amax")
    acted = last >= 0
    return score.new_zeros(len(action_mask)).index_copy(0, last[acted], score[acted])


def shape_rewards(
    score: Float[Tensor, "B"],
    kl: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    offsets: Int64[Tensor, "B+1"],
    *,
    kl_coefficient: float,
) -> Float[Tensor, "N"]:
    """``r_t = [t is the last action] * score - kl_coefficient * kl_t`` at actions, and 0 elsewhere."""
    expect_shape("kl", kl, action_mask.shape)
    penalty = torch.where(action_mask, kl_coefficient * kl, torch.zeros_like(kl))
    return place_scores(score, action_mask, offsets) - penalty
