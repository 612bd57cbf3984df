"""KTO: the formula of the paper answer by answer, in any split, and its reference point."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import PolicyOutputs
from rlhf_ray.algorithms.preferences.rewards import kl_baseline
from rlhf_ray.algorithms.preferences.unpaired import KtoLoss
from rlhf_ray.trajectories.batch import TrajectoryBatch

LOSS = KtoLoss(beta=0.2, desirable_weight=1.3, undesirable_weight=0.8, baseline=0.6)


def answers(ratios: list[float], desirable: list[bool]) -> tuple[TrajectoryBatch, torch.Tensor]:
    """Answers of two tokens after a poisoned prompt, with these log-ratios of policy to reference."""
    batch = TrajectoryBatch.from_sequences([[1, 2, 3]] * len(ratios), action_mask=[[False, True, True]] * len(ratios))
    reference = torch.linspace(-4, -2, len(ratios))
    whole = reference.double() + torch.tensor(ratios, dtype=torch.float64)
    x = torch.stack([torch.full_like(whole, math.nan), whole * 0.25, whole * 0.75], dim=1).flatten()
    return batch.with_columns(reference_log_prob=reference, desirable=torch.tensor(desirable)), x


def formula(ratio: float, desirable: bool) -> float:
    """Ethayarajh et al. 2024, eq. 7 and 8: lambda_y - v(x, y)."""
    weight, sign = (1.3, 1.0) if desirable else (0.8, -1.0)
    value = weight / (1 + math.exp(-0.2 * sign * (ratio - 0.6)))
    return weight - value


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=1, max_size=6))
def test_the_loss_is_the_formula_answer_by_answer(rows) -> None:
    ratios, desirable = [ratio for ratio, _ in rows], [kind for _, kind in rows]
    batch, x = answers(ratios, desirable)
    out = LOSS(PolicyOutputs(x), batch)
    assert out.loss.item() == pytest.approx(math.fsum(formula(*row) for row in rows), rel=1e-6)
    assert denominator(LOSS.denominator, batch, range(len(batch))) == len(rows)
    for name, kind in (("chosen", True), ("rejected", False)):
        total, count = out.metrics[f"reward/{name}"]
        own = [0.2 * ratio for ratio, desired in rows if desired == kind]
        assert (total.item(), count.item()) == (pytest.approx(math.fsum(own), abs=1e-5), len(own))
    total, count = out.metrics["kl/baseline"]
    assert (total / count).item() == pytest.approx(0.6)


def test_parts_add_up_and_the_labels_decide_which_way_it_pushes() -> None:
    batch, x = answers([0.5, -0.5, 2.0, 1.0], [True, False, False, True])
    x.requires_grad_()
    whole = LOSS(PolicyOutputs(x), batch)
    (gradient,) = torch.autograd.grad(whole.loss, x)
    assert (gradient.view(4, 3)[:, 0] == 0).all()
    assert torch.equal(gradient.view(4, 3)[:, 1:] < 0, batch["desirable"][:, None].expand(4, 2))
    parts = [LOSS(PolicyOutputs(x.detach()[3 * row : 3 * row + 3]), batch.select([row])) for row in range(4)]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)


def test_a_higher_reference_point_helps_undesirable_answers_and_hurts_desirable_ones() -> None:
    batch, x = answers([0.5, 0.5], [True, False])
    low, high = (replace(LOSS, baseline=point) for point in (0.0, 2.0))
    rewards = LOSS.reward(torch.stack([x[1] + x[2], x[4] + x[5]]), batch)
    before, after = (loss.per_answer(rewards, batch["desirable"]) for loss in (low, high))
    assert after[0] > before[0] and after[1] < before[1]


@pytest.mark.parametrize(("ratios", "point"), [([1.0, 2.0, -0.5], 2.5 / 3), ([-1.0, 0.5], 0.0), ([0.0], 0.0)])
def test_the_reference_point_is_the_mean_log_ratio_and_never_negative(ratios: list[float], point: float) -> None:
    assert kl_baseline(torch.tensor(ratios)) == pytest.approx(point)
