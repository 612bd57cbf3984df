"""Estimate how much better each action was than expected, and the returns that a critic learns.

An estimator is a frozen dataclass that is called with a batch and its token rewards; ``needs`` names the columns it reads.

Invariants:

- A recursion runs over the actions of a sequence as if the tokens between them were not there: the value after an action is
  that of the state in which the next action was chosen, and neither gamma nor lambda decays over a gap.
- What stands at other tokens, NaN included, has no influence. They get 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rlhf_ray.algorithms.group_baselines import Baseline, group_baseline
from rlhf_ray.algorithms.masked import count_actions, expect_shape, keep, segment_sum, sequence_of_token
from rlhf_ray.trajectories.batch import TrajectoryBatch


@runtime_checkable
class Estimator(Protocol):
    """Turns token rewards into advantages, and into the returns that a critic learns, where there is one."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that it reads, beside ``action_mask``."""

    def __call__(
        self, batch: TrajectoryBatch, token_rewards: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"] | None]: ...


@dataclass(frozen=True)
class Gae:
    """:func:`gae` on the critic's values. Where the batch has a ``bootstrap_value``, it is the value after the last action."""

    gamma: float
    lam: float

    needs: ClassVar[tuple[str, ...]] = ("values",)

    def __call__(
        self, batch: TrajectoryBatch, token_rewards: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"] | None]:
        """Return advantages and returns."""
        bootstrap = batch.tensors.get("bootstrap_value")
        return gae(
            token_rewards, batch["values"], batch["action_mask"], batch.offsets,
            gamma=self.gamma, lam=self.lam, bootstrap_value=bootstrap,
        )  # fmt: skip


@dataclass(frozen=True)
class RewardToGo:
    """:func:`reward_to_go`: the discounted rewards from an action on, without a baseline (REINFORCE; whitened, REINFORCE++)."""

    gamma: float

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: TrajectoryBatch, token_rewards: Float[Tensor, "N"]) -> tuple[Float[Tensor, "N"], None]:
        """Return the discounted rewards as advantages, and no returns: there is no critic to learn them."""
        return reward_to_go(token_rewards, batch["action_mask"], batch.offsets, gamma=self.gamma), None


@dataclass(frozen=True)
class AgainstGroup:
    """Compare the reward of an answer with those of the other answers to its prompt; all its actions get the same."""

    baseline: Baseline

    needs: ClassVar[tuple[str, ...]] = ("prompt_id",)

    def __call__(self, batch: TrajectoryBatch, token_rewards: Float[Tensor, "N"]) -> tuple[Float[Tensor, "N"], None]:
        """Apply :func:`group_baseline` to each answer's sum of token rewards, which includes the KL penalty."""
        mask, offsets = batch["action_mask"], batch.offsets
        rewards = segment_sum(keep(token_rewards, mask).double(), offsets)
        acted = count_actions(mask, offsets) > 0
        advantages = group_baseline(rewards, batch["prompt_id"], acted, self.baseline)
        return keep(advantages[sequence_of_token(offsets, len(mask))].to(token_rewards.dtype), mask), None


def gae(
    token_rewards: Float[Tensor, "N"],
    values: Float[Tensor, "N"],
    action_mask: Bool[Tensor, "N"],
    offsets: Int64[Tensor, "cuts"],
    *,
    gamma: float,
    lam: float,
    bootstrap_value: Float[Tensor, "cuts-1"] | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Estimate generalised advantages (Schulman et al. 2015, eq. 16); returns are advantages + values.

    ``delta_k = r_k + gamma V_{k+1} - V_k`` and ``A_k = delta_k + gamma lam A_{k+1}`` over the actions k of a sequence.
    After the last one the value is ``bootstrap_value``, or 0 without it: a sequence that was cut off then counts as
    ended. Rewards at tokens that are not actions are not read. The sums are float64; the results have the dtype of ``values``.
    Raises ``ValueError`` where shapes differ.
    """
    expect_shape("token_rewards", token_rewards, values.shape)
    expect_shape("action_mask", action_mask, values.shape)
    action_values, counts = values[action_mask].double(), count_actions(action_mask, offsets)
    following = _next_values(action_values, counts, bootstrap_value)
    delta = token_rewards[action_mask].double() + gamma * following - action_values
    advantages = _discounted_sums(delta, counts, gamma * lam)
    return _at_actions(advantages, action_mask, values), _at_actions(advantages + action_values, action_mask, values)


def reward_to_go(
    token_rewards: Float[Tensor, "N"], action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"], *, gamma: float
) -> Float[Tensor, "N"]:
    """Sum discounted rewards: ``G_k = r_k + gamma G_{k+1}`` over the actions k of a sequence (Williams 1992), in float64."""
    expect_shape("action_mask", action_mask, token_rewards.shape)
    rewards = token_rewards[action_mask].double()
    sums = _discounted_sums(rewards, count_actions(action_mask, offsets), gamma)
    return _at_actions(sums, action_mask, token_rewards)


def _next_values(
    action_values: Float[Tensor, "A"], counts: Int64[Tensor, "B"], bootstrap_value: Float[Tensor, "B"] | None
) -> Float[Tensor, "A"]:
    """Shift values to the action before; after the last action of a sequence stands its bootstrap value."""
    following = action_values.roll(-1)
    last = counts.cumsum(0)[counts > 0] - 1
    if bootstrap_value is None:
        return following.index_fill(0, last, 0.0)
    expect_shape("bootstrap_value", bootstrap_value, counts.shape)
    return following.index_copy(0, last, bootstrap_value[counts > 0].double())


def _discounted_sums(delta: Float[Tensor, "A"], counts: Int64[Tensor, "B"], discount: float) -> Float[Tensor, "A"]:
    """Compute ``S_k = delta_k + discount * S_{k+1}`` within each sequence, for all sequences at once, from their ends.

    Sequences are sorted by falling length, so that those with a k-th action from the end are always the first ones.
    """
    lengths, order = counts.sort(descending=True)
    last = (counts.cumsum(0) - 1)[order]
    sums = torch.empty_like(delta)
    longest = int(lengths[0]) if len(lengths) else 0
    # longer_than[k]: how many sequences have more than k actions
    longer_than = (len(lengths) - torch.bincount(lengths, minlength=longest + 1).cumsum(0)).tolist()
    carry = delta.new_zeros(len(lengths))
    for step, sequences in enumerate(longer_than[:longest]):
        position = last[:sequences] - step
        carry = delta[position] + discount * carry[:sequences]
        sums[position] = carry
    return sums


def _at_actions(
    of_actions: Float[Tensor, "A"], action_mask: Bool[Tensor, "N"], like: Float[Tensor, "N"]
) -> Float[Tensor, "N"]:
    return torch.zeros_like(like).masked_scatter(action_mask, of_actions.to(like.dtype))
