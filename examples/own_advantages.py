"""An advantage estimator of your own: the rank of an answer among the answers to its prompt.

    rlhf-ray train ppo demo-ppo algorithm.name=grpo critic=null batch.samples_per_prompt=4 batch.prompts_per_step=32 \
        algorithm.advantages=examples/own_advantages.py:Ranks algorithm.parameters.advantages.scale=2.0

Ranks do not depend on the scale of the reward, and one answer of an extreme score moves the others by one place at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.masked import keep, segment_sum, sequence_of_token
from rlhf_ray.trajectories.batch import TrajectoryBatch


class Ranks:
    """From ``-scale`` for the worst answer to a prompt to ``scale`` for the best; equal rewards share their mean rank."""

    needs = ("prompt_id",)
    """The columns that it reads. With "values" among them the job needs a critic section."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, batch: TrajectoryBatch, token_rewards: Tensor) -> tuple[Tensor, None]:
        """Advantages of shape (N,) like ``token_rewards``; no returns, since no critic learns them."""
        rewards = segment_sum(keep(token_rewards, batch["action_mask"]), batch.offsets)  # (B,)
        same_prompt = batch["prompt_id"][:, None] == batch["prompt_id"][None, :]
        difference = rewards[:, None] - rewards[None, :]
        wins = (torch.sign(difference) * same_prompt).sum(dim=1)  # answers that it beats, less those that beat it
        others = (same_prompt.sum(dim=1) - 1).clamp(min=1)
        return (self.scale * wins / others)[sequence_of_token(batch.offsets)], None
