"""Compare each answer with the other answers to its prompt (its group): leave-one-out, the mean, the z-score.

Invariants:

- Only rows of the same group influence each other. Groups may have any sizes and stand in any order.
- A row that does not count, such as an answer without an action, gets 0 and moves no baseline.
- Rows whose group is all equal get exactly 0, and so does a row that is alone in its group.
- A NaN stays in its own group. Everything is computed in float64 and returned in the dtype of the rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import expect_shape

GROUP_EPSILON = 1e-6
"""What is added to the standard deviation of a group (TRL: 1e-4, OpenRLHF: 1e-9)."""

Baseline = Literal["leave_one_out", "group_mean", "group_norm"]


@dataclass(frozen=True)
class GroupStatistics:
    """For each row, of its group: the number of rows that count, their sum, and their squared distances from the mean."""

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
    """Sum up each row's group; rows that do not count are not read. Raises ``ValueError`` where shapes differ."""
    expect_shape("group", group, rewards.shape)
    expect_shape("counted", counted, rewards.shape)
    _, group_of_row = torch.unique(group, return_inverse=True)
    groups = int(group_of_row.max()) + 1 if len(group_of_row) else 0
    values = torch.where(counted, rewards.double(), 0.0)

    def sum_over_group(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(groups).index_add(0, group_of_row, numbers)[group_of_row]

    count, total = sum_over_group(counted.double()), sum_over_group(values)
    centred = torch.where(counted, values - total / count.clamp(min=1), 0.0)
    return GroupStatistics(count, total, sum_over_group(centred.square()))


def group_baseline(
    rewards: Float[Tensor, "B"],
    group: Int64[Tensor, "B"],
    counted: Bool[Tensor, "B"],
    baseline: Baseline,
    *,
    unbiased: bool = True,
    epsilon: float = GROUP_EPSILON,
) -> Float[Tensor, "B"]:
    """Say how much better each answer is than its group.

    - ``leave_one_out``: ``r_i - mean of the others`` (Kool et al. 2019; Ahmadian et al. 2024, RLOO);
    - ``group_mean``: ``r_i - mean`` (Liu et al. 2025, Dr. GRPO; Hu et al. 2025, REINFORCE++-baseline);
    - ``group_norm``: ``(r_i - mean) / (std + epsilon)`` (Shao et al. 2024, GRPO), the variance divided by n - 1
      (``unbiased``) or n.
    """
    statistics = group_statistics(rewards, group, counted)
    values = torch.where(counted, rewards.double(), 0.0)
    difference = values - statistics.mean
    if baseline == "leave_one_out":
        # r - (total - r) / (n - 1) = (r - mean) n / (n - 1), which is exactly 0 where all are equal
        advantages = difference * statistics.count / (statistics.count - 1).clamp(min=1)
    elif baseline == "group_mean":
        advantages = difference
    elif baseline == "group_norm":
        deviation = (statistics.scatter / (statistics.count - int(unbiased)).clamp(min=1)).sqrt()
        advantages = difference / (deviation + epsilon)
    else:
        raise ValueError(f"baseline {baseline!r} is unknown: use leave_one_out, group_mean or group_norm")
    return torch.where(counted, advantages, 0.0).to(rewards.dtype)


def without_signal(
    rewards: Float[Tensor, "B"], group: Int64[Tensor, "B"], counted: Bool[Tensor, "B"]
) -> Bool[Tensor, "B"]:
    """Mark the rows whose group has no two different rewards, so that no baseline tells its answers apart."""
    return group_statistics(rewards, group, counted).scatter == 0.0
