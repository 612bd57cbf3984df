"""The loss of reward models: pair by pair, in any order and split; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.rankings import Ordinal, Scaled
from rlhf_ray.algorithms.reward_losses import RewardLoss, RewardOutputs, router_balance
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
def test_the_loss_is_the_formula_pair_by_pair(scores, centering, with_margin) -> None:
    batch = pairs(len(scores), [m for _, _, m in scores] if with_margin else None)
    x = torch.tensor([s for chosen, rejected, _ in scores for s in (chosen, rejected)], dtype=torch.float64)
    out = RewardLoss(centering=centering)(x, batch)
    ranking = sum(math.log1p(math.exp(-(c - r - (m if with_margin else 0)))) for c, r, m in scores)
    total = ranking + centering * sum((c + r) ** 2 for c, r, _ in scores)
    expected = {
        "loss/rm": ranking,
        "accuracy": sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r, _ in scores),
        "margin": sum(c - r for c, r, _ in scores),
        "reward/chosen": sum(c for c, _, _ in scores),
        "reward/rejected": sum(r for _, r, _ in scores),
    }
    if centering:
        expected["loss/centering"] = sum((c + r) ** 2 for c, r, _ in scores)
    assert out.loss.item() == pytest.approx(total, abs=1e-9)
    assert out.metrics.keys() == expected.keys()
    for name, (value, count) in out.metrics.items():
        assert (value.item(), count.item()) == (pytest.approx(expected[name], abs=1e-9), len(scores)), name


def test_the_gradient_is_that_of_finite_differences() -> None:
    x = torch.tensor([0.3, -0.4, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    batch = pairs(2, [0.5, 0.0])
    assert torch.autograd.gradcheck(lambda y: RewardLoss(centering=0.01)(y, batch).loss, (x,))


@settings(deadline=None, max_examples=20)
@given(data=st.data(), count=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_pairs_in_any_order_and_split_add_up(data, count, seed) -> None:
    x = torch.randn(2 * count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = pairs(count, [0.1 * i for i in range(count)])
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    loss = RewardLoss(centering=0.01)
    parts = [[row for pair in part for row in (2 * pair, 2 * pair + 1)] for part in (order[:cut], order[cut:]) if part]
    outs = [loss(x[part], batch.select(part)) for part in parts]
    whole = loss(x, batch)
    torch.testing.assert_close(sum(out.loss for out in outs), whole.loss, rtol=1e-12, atol=1e-12)
    assert sum(denominator("pairs", batch, part) for part in parts) == count
    for name, (total, number) in whole.metrics.items():
        torch.testing.assert_close(sum(out.metrics[name][0] for out in outs), total, rtol=1e-12, atol=1e-12)
        assert sum(out.metrics[name][1] for out in outs) == number


def test_a_nan_score_reaches_the_loss() -> None:
    out = RewardLoss()(torch.tensor([1.0, math.nan]), pairs(1))
    assert out.loss.isnan()
    assert out.metrics["accuracy"][0].item() == 0


@pytest.mark.usefixtures("outside_pytest")
def test_scores_must_be_one_a_sequence_and_whole_pairs() -> None:
    with pytest.raises(ValueError, match=r"scores of the reward model has shape \(4, 1\)"):
        RewardLoss()(torch.zeros(4, 1), pairs(2))
    with pytest.raises(ValueError, match="3 sequences are not whole pairs"):
        RewardLoss()(torch.zeros(3), TrajectoryBatch.from_sequences([[1, 2]] * 3))


def test_label_smoothing_is_the_mean_over_both_labels() -> None:
    x = torch.tensor([1.5, -0.5, 0.2, 0.9], dtype=torch.float64)
    batch = pairs(2, [0.5, 0.25])
    smoothed = RewardLoss(label_smoothing=0.1).per_pair(x[0::2] - x[1::2], batch)
    right = [math.log1p(math.exp(m - d)) for d, m in ((2.0, 0.5), (-0.7, 0.25))]
    wrong = [math.log1p(math.exp(m + d)) for d, m in ((2.0, 0.5), (-0.7, 0.25))]
    assert smoothed.tolist() == pytest.approx([0.9 * r + 0.1 * w for r, w in zip(right, wrong, strict=True)], abs=1e-12)


def test_pairs_of_grade_zero_are_ties_that_no_accuracy_or_margin_counts() -> None:
    batch = pairs(3).with_columns(grade=torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    out = RewardLoss(Ordinal((0.5,)))(torch.tensor([5.0, 0.0, 1.0, 0.0, 0.0, 3.0]), batch)
    assert [value.item() for value in out.metrics["accuracy"]] == [1.0, 2.0]
    assert [value.item() for value in out.metrics["margin"]] == [-2.0, 2.0]
    assert out.metrics["loss/rm"][1] == out.metrics["reward/chosen"][1] == 3


def test_a_ranking_that_needs_a_column_says_so() -> None:
    with pytest.raises(ValueError, match="ranking scaled reads a number of each pair, but the batch has none"):
        RewardLoss(Scaled())(torch.zeros(2), pairs(1))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_router_balance_is_that_of_transformers(top_k: int) -> None:
    layers = [torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    theirs = load_balancing_loss_func(tuple(layers), num_experts=4, top_k=top_k)
    torch.testing.assert_close(router_balance(layers, top_k), theirs, rtol=0, atol=1e-6)
    even = [torch.eye(4).repeat(2, 1) * 50]
    torch.testing.assert_close(router_balance(even, 1), torch.tensor(1.0))
    torch.testing.assert_close(router_balance([torch.eye(4)[:1].repeat(8, 1) * 50], 1), torch.tensor(4.0))


def test_router_balance_counts_once_a_pair_and_reaches_the_routers() -> None:
    balance = torch.tensor(1.25, requires_grad=True)
    out = RewardLoss(router_balance=0.02)(RewardOutputs(torch.zeros(4), balance), pairs(2))
    assert out.loss.item() == pytest.approx(2 * math.log(2) + 2 * 0.02 * 1.25)
    assert torch.autograd.grad(out.loss, balance)[0].item() == pytest.approx(0.04)
    assert [value.item() for value in out.metrics["loss/router_balance"]] == [2.5, 2.0]
    with pytest.raises(ValueError, match="the model has no routers"):
        RewardLoss(router_balance=0.02)(torch.zeros(4), pairs(2))
