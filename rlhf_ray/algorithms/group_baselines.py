"""Baselines from the other answers to the same prompt: leave-one-out, the group's mean, the group's z-score.

Always true: only rows of the same group compare; groups may have any sizes and stand in any order; a row that does not
count (an answer without an action) gets 0 and moves no baseline; rows whose group is all equal get exactly 0, and so does
a row that is alone. A NaN stays in its own group. Computed in float64, returned in the dtype of the rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import expect_shape

GROUP_EPSILON = 1e-6
"""Added to a group's standard deviation (TRL: 1e-4, OpenRLHF: 1e-9)."""

Baseline = Literal["leave_one_out", "group_mean", "group_norm"]


@dataclass(frozen=True)
class GroupStatistics:
    """Of each row's group: how many rows count, their sum, and their variance times their number."""

    count: Float[Tensor, "B"]
    total: Float[Tensor, "B"]
    scatter: Float[Tensor, "B"]

    @property
    def mean(self) -> Float[Tensor, "B"]:
        """The mean of the rows that count."""
        return self.total / self.count.clamp(min=1)


def group_statistics(
    rewards: Float[Tensor, "B"], group: Int64[Tensor, "B"], counted: Bool[Tensor, "B"]
) -> GroupStatistics:
    """What each row must know of its group; rows that do not count are not read."""
    expect_shape("group", group, rewards.shape)
    expect_shape("counted", counted, rewards.shape)
    _, row_of = torch.unique(group, return_inverse=True)
    groups = int(row_of.max()) + 1 if len(row_of) else 0
    values = torch.where(counted, rewards.double(), 0.0)

    def summed(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(groups).index_add(0, row_of, numbers)[row_of]

    count, total = summed(counted.double()), summed(values)
    centred = torch.where(counted, values - total / count.clamp(min=1), 0.0)
    return GroupStatistics(count, total, summed(centred.square()))


def group_baseline(
    rewards: Float[Tensor, "B"],
    group: Int64[Tensor, "B"],
    counted: Bool[Tensor, "B"],
    baseline: Baseline,
    *,
    unbiased: bool = True,
    epsilon: float = GROUP_EPSILON,
) -> Float[Tensor, "B"]:
    """How much better each answer is than its group.

    - ``leave_one_out``: ``r_i - mean of the others`` (Kool et al. 2019; Ahmadian et al. 2024, RLOO);
    - ``group_mean``: ``r_i - mean`` (Liu et al. 2025, Dr. GRPO; Hu et al. 2025, REINFORCE++-baseline);
    - ``group_norm``: ``(r_i - mean) / (std + epsilon)`` (Shao et al. 2024, GRPO), the variance divided by n - 1
      (``unbiased``) or n.
    """
    of_group = group_statistics(rewards, group, counted)
    values = torch.where(counted, rewards.double(), 0.0)
    difference = values - of_group.mean
    if baseline == "leave_one_out":
        # r - (total - r) / (n - 1) = (r - mean) n / (n - 1), which is exactly 0 where all are equal
        advantages = difference * of_group.count / (of_group.count - 1).clamp(min=1)
    elif baseline == "group_mean":
        advantages = difference
    elif baseline == "group_norm":
        deviation = (of_group.scatter / (of_group.count - int(unbiased)).clamp(min=1)).sqrt()
        advantages = difference / (deviation + epsilon)
    else:
        raise ValueError(f"baseline {baseline!r} is unknown: use leave_one_out, group_mean or group_norm")
    return torch.where(counted, advantages, 0.0).to(rewards.dtype)


def without_signal(
    rewards: Float[Tensor, "B"], group: Int64[Tensor, "B"], counted: Bool[Tensor, "B"]
) -> Bool[Tensor, "B"]:
    """Rows whose group has no two different rewards: no baseline tells its answers apart."""
    return group_statistics(rewards, group, counted).scatter == 0.0
