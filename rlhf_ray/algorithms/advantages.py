"""Advantages and returns over ragged sequences whose actions may have gaps.

Always true: the recursion runs over a sequence's actions alone, as if the tokens between them were not there: the value
after an action is that of the state in which the next action was chosen, and neither gamma nor lambda decays over a
gap. What stands at other tokens, NaN included, has no influence; they get 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.masked import count_actions, expect_shape


def gae(
    token_rewards: Float[Tensor, "N"],
    values: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    offsets: Int64[Tensor, "B+1"],
    *,
    gamma: float,
    lam: float,
    bootstrap_value: Float[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Generalised advantage estimation (Schulman et al. 2015), and returns = advantages + values.

    ``delta_k = r_k + gamma V_{k+1} - V_k`` and ``A_k = delta_k + gamma lam A_{k+1}`` over the actions k of a sequence.
    After the last one the value is ``bootstrap_value``, or 0 without it: a sequence that was cut off then counts as
    ended. Rewards at tokens that are no action are not read. Computed in float64, returned in the dtype of ``values``.
    """
    expect_shape("token_rewards", token_rewards, values.shape)
    expect_shape("action_mask", action_mask, values.shape)
    action_values, counts = values[action_mask].double(), count_actions(action_mask, offsets)
    following = _next_values(action_values, counts, bootstrap_value)
    delta = token_rewards[action_mask].double() + gamma * following - action_values
    advantages = _discounted_sums(delta, counts, gamma * lam)
    return _at_actions(advantages, action_mask, values), _at_actions(advantages + action_values, action_mask, values)


def _next_values(
    action_values: Float[Tensor, "A"], counts: Int64[Tensor, "B"], bootstrap_value: Float[Tensor, "B"] | None
) -> Float[Tensor, "A"]:
    """The value of each sequence's next action, and the bootstrap value after its last."""
    following = action_values.roll(-1)
    last = counts.cumsum(0)[counts > 0] - 1
    if bootstrap_value is None:
        return following.index_fill(0, last, 0.0)
    expect_shape("bootstrap_value", bootstrap_value, counts.shape)
    return following.index_copy(0, last, bootstrap_value[counts > 0].double())


def _discounted_sums(delta: Float[Tensor, "A"], counts: Int64[Tensor, "B"], discount: float) -> Float[Tensor, "A"]:
    """``S_k = delta_k + discount * S_{k+1}`` within each sequence, for all sequences at once, from their ends.

    Sequences are ordered by falling length, so that those that still have a k-th action from the end come first.
    """
    lengths, order = counts.sort(descending=True)
    last = (counts.cumsum(0) - 1)[order]
    sums = torch.empty_like(delta)
    longest = int(lengths[0]) if len(lengths) else 0
    # still[k]: how many sequences have more than k actions
    still = (len(lengths) - torch.bincount(lengths, minlength=longest + 1).cumsum(0)).tolist()
    carry = delta.new_zeros(len(lengths))
    for step, alive in enumerate(still[:longest]):
        position = last[:alive] - step
        carry = delta[position] + discount * carry[:alive]
        sums[position] = carry
    return sums


def _at_actions(
    of_actions: Float[Tensor, "A"], action_mask: Bool[Tensor, "N"], like: Float[Tensor, "N"]
) -> Float[Tensor, "N"]:
    return torch.zeros_like(like).masked_scatter(action_mask, of_actions.to(like.dtype))
