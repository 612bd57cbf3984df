"""Packed equals padded: tokens that are not actions, put behind every answer and between its actions, change no number.

A padded batch is one whose sequences all have the same length, with NaN at the padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.advantages import AgainstGroup, Gae, RewardToGo
from rlhf_ray.algorithms.importance import ImportanceCorrection
from rlhf_ray.algorithms.losses import PolicyOutputs, ValueLoss
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, KlTerm, PolicyLoss
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.algorithms.shaping import MissingEos, Overlong, RewardShaping
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import PER_TOKEN

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)
SHAPING = RewardShaping("running", 2.0, 3.0, Overlong(9, 4, 1.0), None, MissingEos("subtract", 0.5))
PREPARATIONS = {
    "ppo": Preparation(SHAPING, Gae(0.99, 0.9), ImportanceCorrection("token"), "k3", whiten_advantages="population"),
    "reinforce++": Preparation(
        SHAPING, RewardToGo(0.9), ImportanceCorrection("sequence", "mask"), "k1", whiten_advantages="unbiased"
    ),
    "rloo": Preparation(
        SHAPING, AgainstGroup("leave_one_out"), ImportanceCorrection("none"), "k1", whiten_rewards="population"
    ),
    "grpo": Preparation(SHAPING, AgainstGroup("group_norm"), ImportanceCorrection("token"), placement="spread"),
}
LOSSES = {
    "ppo": PolicyLoss(Clipped(0.2, 0.3, 2.0), entropy_coefficient=0.01),
    "grpo": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences", kl=KlTerm(0.1, "k3")),
    "gspo": PolicyLoss(Clipped(0.1, 0.2), ratio="sequence", aggregation="sequences"),
    "rloo": PolicyLoss(Clipped(0.2, 0.2), ratio="trajectory", aggregation="constant", constant_tokens=9),
    "cispo": PolicyLoss(Cispo(None, 0.5)),
    "dppo": PolicyLoss(Dppo("binary_kl", 0.01, 0.02)),
    "value": ValueLoss(0.2),
}


def padded(batch: TrajectoryBatch, width: int) -> tuple[TrajectoryBatch, Tensor]:
    """The batch with every sequence ``width`` long, and where its own tokens are."""
    own = torch.cat([torch.arange(width) < length for length in batch.lengths.tolist()])
    columns = {}
    for name, column in batch.tensors.items():
        if name in PER_TOKEN:
            fill = math.nan if column.is_floating_point() else 0
            columns[name] = torch.full((len(own),), fill, dtype=column.dtype).masked_scatter(own, column)
        else:
            columns[name] = column
    return TrajectoryBatch(torch.arange(len(batch) + 1) * width, columns), own


def make(ragged: Callable[..., TrajectoryBatch], lengths: list[int], seed: int) -> TrajectoryBatch:
    batch = ragged(lengths, seed, poison=math.nan)
    return batch.with_columns(prompt_id=torch.arange(len(batch)) % 2)


@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, seed=SEEDS)
@pytest.mark.parametrize("name", PREPARATIONS)
def test_a_padded_batch_is_prepared_as_a_packed_one(ragged, name, lengths, seed) -> None:
    packed = make(ragged, lengths, seed)
    wide, own = padded(packed, max(lengths) + 2)
    moments = RunningMoments().update(packed["score"])
    expected, metrics = PREPARATIONS[name](packed, kl_coefficient=0.1, moments=moments)
    prepared, padded_metrics = PREPARATIONS[name](wide, kl_coefficient=0.1, moments=moments)
    for column in ("token_rewards", "advantages", "importance_weights"):
        torch.testing.assert_close(prepared[column][own], expected[column], rtol=1e-6, atol=1e-6)
        assert (prepared[column][~own] == 0).all()
    assert padded_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, seed=SEEDS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_padded_batch_has_the_loss_and_the_gradient_of_a_packed_one(ragged, name, lengths, seed) -> None:
    packed = make(ragged, lengths, seed)
    wide, own = padded(packed, max(lengths) + 2)
    x = packed["log_probs"] + 0.3 * torch.randn(packed.num_tokens, generator=torch.Generator().manual_seed(seed))

    def run(batch: TrajectoryBatch, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = log_probs.detach().clone().requires_grad_()
        outputs = log_probs if name == "value" else PolicyOutputs(log_probs, 0.5 * log_probs)
        loss = LOSSES[name](outputs, batch).loss  # type: ignore[arg-type]
        return loss, torch.autograd.grad(loss, log_probs)[0]

    loss, gradient = run(packed, x)
    wide_loss, wide_gradient = run(wide, torch.full((len(own),), math.nan).masked_scatter(own, x))
    torch.testing.assert_close(wide_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide_gradient[own], gradient, rtol=1e-6, atol=1e-7)
    assert (wide_gradient[~own] == 0).all()
