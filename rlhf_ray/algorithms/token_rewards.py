"""Turn the score of each sequence into rewards of its tokens.

Invariants:

- A score is placed at the last action of its sequence, which is the sampled end of sequence if there is one, or is spread
  evenly over all its actions.
- The token rewards of a sequence add up to its score minus the coefficient times its KL. They are 0 at every token that is no
  action, and a sequence without an action gets no reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import count_actions, expect_shape, sequence_of_token

Placement = Literal["last_action", "spread"]


def place_scores(
    score: Float[Tensor, "B"],
    action_mask: Bool[Tensor, "N"],
    offsets: Int64[Tensor, "B+1"],
    placement: Placement = "last_action",
) -> Float[Tensor, "N"]:
    """Put each score at the last action of its sequence, or an equal part at each of its actions; 0 elsewhere.

    Raises ``ValueError`` where shapes differ or the placement is unknown.
    """
    expect_shape("score", score, (len(offsets) - 1,))
    rows = sequence_of_token(offsets, len(action_mask))
    if placement == "spread":
        parts = score / count_actions(action_mask, offsets).clamp(min=1)
        return torch.where(action_mask, parts[rows], torch.zeros_like(parts[rows]))
    if placement != "last_action":
        raise ValueError(f"placement {placement!r} is unknown: use last_action or spread")
    positions = torch.arange(len(action_mask), device=action_mask.device)
    none = torch.full_like(offsets[1:], -1)  # where a sequence has no action
    last = none.scatter_reduce(0, rows, torch.where(action_mask, positions, -1), reduce="amax")
    acted = last >= 0
    return score.new_zeros(len(action_mask)).index_copy(0, last[acted], score[acted])


def make_token_rewards(
    score: Float[Tensor, "B"],
    kl: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    offsets: Int64[Tensor, "B+1"],
    *,
    kl_coefficient: float,
    placement: Placement = "last_action",
) -> Float[Tensor, "N"]:
    """Return ``r_t = score_t - kl_coefficient * kl_t`` at actions and 0 elsewhere; ``placement`` decides score_t."""
    expect_shape("kl", kl, action_mask.shape)
    penalty = torch.where(action_mask, kl_coefficient * kl, torch.zeros_like(kl))
    return place_scores(score, action_mask, offsets, placement) - penalty
