"""The ranking loss pair by pair, stable far out, in any order and split; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.reward_losses import BradleyTerry
from rlhf_ray.trajectories.batch import TrajectoryBatch


def pairs(count: int, margin: list[float] | None = None) -> TrajectoryBatch:
    batch = TrajectoryBatch.from_sequences([[1, 2]] * (2 * count))
    if margin is None:
        return batch
    both = [number for m in margin for number in (m, math.nan)]  # read at the chosen side alone
    return batch.with_columns(margin=torch.tensor(both, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(
    scores=st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8), st.floats(0, 3)), min_size=1, max_size=6),
    centering=st.sampled_from([0.0, 0.01, 1.0]),
    with_margin=st.booleans(),
)
def test_bradley_terry_is_the_formula_pair_by_pair(scores, centering, with_margin) -> None:
    batch = pairs(len(scores), [m for _, _, m in scores] if with_margin else None)
    x = torch.tensor([s for chosen, rejected, _ in scores for s in (chosen, rejected)], dtype=torch.float64)
    out = BradleyTerry(centering)(x, batch)
    ranking = sum(math.log1p(math.exp(-(c - r - (m if with_margin else 0)))) for c, r, m in scores)
    total = ranking + centering * sum((c + r) ** 2 for c, r, _ in scores)
    expected = {
        "loss/rm": ranking,
        "accuracy": sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r, _ in scores),
        "margin": sum(c - r for c, r, _ in scores),
        "reward/chosen": sum(c for c, _, _ in scores),
        "reward/rejected": sum(r for _, r, _ in scores),
    }
    assert out.loss.item() == pytest.approx(total, abs=1e-9)
    assert out.metrics.keys() == expected.keys()
    for name, (value, count) in out.metrics.items():
        assert (value.item(), count.item()) == (pytest.approx(expected[name], abs=1e-9), len(scores)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("difference", "loss", "slope"), [(-200.0, 200.0, -1.0), (200.0, 0.0, 0.0), (0.0, math.log(2), -0.5)]
)
def test_bradley_terry_is_stable_far_out(dtype, difference, loss, slope) -> None:
    x = torch.tensor([difference, 0.0], dtype=dtype, requires_grad=True)
    out = BradleyTerry()(x, pairs(1))
    (gradient,) = torch.autograd.grad(out.loss, x)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert gradient.tolist() == pytest.approx([slope, -slope], abs=1e-6)


def test_bradley_terry_gradient_is_that_of_finite_differences() -> None:
    x = torch.tensor([0.3, -0.4, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    batch = pairs(2, [0.5, 0.0])
    assert torch.autograd.gradcheck(lambda y: BradleyTerry(0.01)(y, batch).loss, (x,))


@settings(deadline=None, max_examples=20)
@given(data=st.data(), count=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_pairs_in_any_order_and_split_add_up(data, count, seed) -> None:
    x = torch.randn(2 * count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = pairs(count, [0.1 * i for i in range(count)])
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    loss = BradleyTerry(0.01)
    parts = [[row for pair in part for row in (2 * pair, 2 * pair + 1)] for part in (order[:cut], order[cut:]) if part]
    outs = [loss(x[part], batch.select(part)) for part in parts]
    whole = loss(x, batch)
    torch.testing.assert_close(sum(out.loss for out in outs), whole.loss, rtol=1e-12, atol=1e-12)
    assert sum(denominator("pairs", batch, part) for part in parts) == count
    for name, (total, number) in whole.metrics.items():
        torch.testing.assert_close(sum(out.metrics[name][0] for out in outs), total, rtol=1e-12, atol=1e-12)
        assert sum(out.metrics[name][1] for out in outs) == number


def test_a_nan_score_reaches_the_loss() -> None:
    out = BradleyTerry()(torch.tensor([1.0, math.nan]), pairs(1))
    assert out.loss.isnan()
    assert out.metrics["accuracy"][0].item() == 0


def test_scores_must_be_one_a_sequence_and_whole_pairs() -> None:
    with pytest.raises(ValueError, match=r"scores of the reward model has shape \(4, 1\)"):
        BradleyTerry()(torch.zeros(4, 1), pairs(2))
    with pytest.raises(ValueError, match="3 sequences are not whole pairs"):
        BradleyTerry()(torch.zeros(3), TrajectoryBatch.from_sequences([[1, 2]] * 3))
