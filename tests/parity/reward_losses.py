"""The losses of reward models against TRL's and OpenRLHF's, from the same scores, with their gradients.

OpenRLHF's ``LogExpLoss`` ignores a margin and overflows where a difference passes -88: it is compared inside that range.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_ray.algorithms.rankings import LogExp, Sigmoid
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.trajectories.batch import TrajectoryBatch

PAIRS = 32
CASES = {
    "openrlhf sigmoid": (RewardLoss(Sigmoid()), False),
    "openrlhf sigmoid with margin": (RewardLoss(Sigmoid()), True),
    "openrlhf logexp": (RewardLoss(LogExp()), False),
    "trl sigmoid": (RewardLoss(Sigmoid()), False),
    "trl sigmoid with margin": (RewardLoss(Sigmoid()), True),
    "trl sigmoid with margin and centering": (RewardLoss(Sigmoid(), centering=0.01), True),
}
"""Our loss, and whether it is given margins."""


def make_inputs(seed: int = 23) -> dict[str, Any]:
    """Scores from nearly equal to far apart, either way round."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 1.2, PAIRS)
    scores = torch.randn(2, PAIRS, generator=generator) * spread
    margin = torch.rand(PAIRS, generator=generator) * 3
    return {"seed": seed, "chosen": scores[0].numpy(), "rejected": scores[1].numpy(), "margin": margin.numpy()}


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """What the oracle reads."""
    np.savez(directory / "inputs.npz", **{name: value for name, value in inputs.items() if name != "seed"})


def ours(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Loss over the number of pairs, and gradients."""
    values = {}
    for name, (loss, with_margin) in CASES.items():
        scores = torch.from_numpy(np.stack([inputs["chosen"], inputs["rejected"]], axis=1).flatten()).requires_grad_()
        batch = TrajectoryBatch.from_sequences([[1, 2]] * len(scores))
        if with_margin:
            batch = batch.with_columns(margin=torch.from_numpy(inputs["margin"].repeat(2)))
        value = loss(scores, batch).loss / (len(scores) // 2)
        (gradient,) = torch.autograd.grad(value, scores)
        named = {"loss": value.detach(), "chosen gradient": gradient[0::2], "rejected gradient": gradient[1::2]}
        values |= {f"{name}/{key}": tensor.numpy() for key, tensor in named.items()}
    return values
