"""Batches that several tests use."""

from __future__ import annotations

import torch

from rlhf_ray.trajectories.batch import TrajectoryBatch


def small() -> TrajectoryBatch:
    return TrajectoryBatch.from_sequences(
        [[1, 2, 3], [4, 5], [6, 7, 8, 9]],
        action_mask=[[0, 1, 1], [0, 1], [0, 0, 1, 1]],
        log_probs=torch.arange(9.0),
        score=[1, 2.5, 3],
        prompt_id=[7, 7, 8],
    )
