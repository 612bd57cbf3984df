"""DPO and its relatives: the formulas of the papers pair by pair, in any order and split, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import PolicyOutputs
from rlhf_ray.algorithms.preferences.pairs import Logistic, PolicyPairLoss, Squared
from rlhf_ray.algorithms.preferences.rewards import ImplicitReward, answer_log_probs
from rlhf_ray.trajectories.batch import TrajectoryBatch

BETA, SMOOTHING, GAMMA = 0.3, 0.1, 0.7
Side = tuple[float, float, int]
"""The log-prob of an answer, that under the reference, and its tokens."""


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def dpo(chosen: Side, rejected: Side) -> float:
    """Rafailov et al. 2023, eq. 7."""
    return -log_sigmoid(BETA * (chosen[0] - chosen[1]) - BETA * (rejected[0] - rejected[1]))


def cdpo(chosen: Side, rejected: Side) -> float:
    """Mitchell 2023: the expectation over a label that is wrong with probability ``SMOOTHING``."""
    return (1 - SMOOTHING) * dpo(chosen, rejected) + SMOOTHING * dpo(rejected, chosen)


def ipo(chosen: Side, rejected: Side) -> float:
    """Azar et al. 2023, eq. 17."""
    return ((chosen[0] - chosen[1]) - (rejected[0] - rejected[1]) - 1 / (2 * BETA)) ** 2


def mean_ipo(chosen: Side, rejected: Side) -> float:
    ratios = [(log_prob - reference) / tokens for log_prob, reference, tokens in (chosen, rejected)]
    return (ratios[0] - ratios[1] - 1 / (2 * BETA)) ** 2


def mean_dpo(chosen: Side, rejected: Side) -> float:
    ratios = [(log_prob - reference) / tokens for log_prob, reference, tokens in (chosen, rejected)]
    return -log_sigmoid(BETA * (ratios[0] - ratios[1]))


def simpo(chosen: Side, rejected: Side) -> float:
    """Meng et al. 2024, eq. 6."""
    return -log_sigmoid(BETA * chosen[0] / chosen[2] - BETA * rejected[0] / rejected[2] - GAMMA)


FORMULAS: dict[str, tuple[PolicyPairLoss, Callable[[Side, Side], float]]] = {
    "dpo": (PolicyPairLoss(Logistic(), ImplicitReward(BETA)), dpo),
    "cdpo": (PolicyPairLoss(Logistic(SMOOTHING), ImplicitReward(BETA)), cdpo),
    "ipo": (PolicyPairLoss(Squared(BETA), ImplicitReward(BETA)), ipo),
    "ipo of means": (PolicyPairLoss(Squared(BETA), ImplicitReward(BETA, length_normalised=True)), mean_ipo),
    "dpo of means": (PolicyPairLoss(Logistic(), ImplicitReward(BETA, length_normalised=True)), mean_dpo),
    "simpo": (PolicyPairLoss(Logistic(0.0, GAMMA), ImplicitReward(BETA, True, reference=False)), simpo),
}


def ragged(lengths: list[tuple[int, int]], seed: int) -> tuple[TrajectoryBatch, Tensor]:
    """Sequences of a prompt and an answer, with a reference, and log-probs of every token, those of prompts poisoned."""
    draw = torch.Generator().manual_seed(seed)
    masks = [[False] * prompt + [True] * answer for prompt, answer in lengths]
    batch = TrajectoryBatch.from_sequences([[1] * len(mask) for mask in masks], action_mask=masks)
    x = -torch.rand(batch.num_tokens, generator=draw, dtype=torch.float64) * 3
    x[~batch["action_mask"]] = math.nan
    reference = -torch.rand(len(lengths), generator=draw) * 9
    return batch.with_columns(reference_log_prob=reference), x


def sides(batch: TrajectoryBatch, x: Tensor) -> list[Side]:
    found = []
    for row, (start, end) in enumerate(zip(batch.offsets.tolist(), batch.offsets.tolist()[1:], strict=False)):
        own = [value for value in x[start:end].tolist() if not math.isnan(value)]
        found.append((math.fsum(own), float(batch["reference_log_prob"][row]), len(own)))
    return found


LENGTHS = st.lists(
    st.tuples(st.tuples(st.integers(1, 4), st.integers(1, 6)), st.tuples(st.integers(1, 4), st.integers(1, 6))),
    min_size=1, max_size=5,
).map(lambda found: [side for pair in found for side in pair])  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 999), name=st.sampled_from(sorted(FORMULAS)))
def test_a_loss_is_its_formula_pair_by_pair(lengths, seed, name) -> None:
    batch, x = ragged(lengths, seed)
    loss, formula = FORMULAS[name]
    found = sides(batch, x)
    expected = [formula(*pair) for pair in zip(found[0::2], found[1::2], strict=True)]
    out = loss(PolicyOutputs(x), batch)
    assert out.loss.item() == pytest.approx(math.fsum(expected), rel=1e-9)
    assert denominator(loss.denominator, batch, range(len(batch))) == len(expected)
    assert out.metrics["loss/dpo"] == (out.loss, len(expected))
    for side in (0, 1):
        total, count = out.metrics[f"log_prob/{('chosen', 'rejected')[side]}"]
        assert total.item() == pytest.approx(math.fsum(log_prob for log_prob, _, _ in found[side::2]))
        assert count == len(expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_parts_add_up_and_prompts_have_no_gradient(name: str) -> None:
    batch, x = ragged([(1, 3), (1, 2), (3, 1), (2, 5), (1, 1), (4, 2)], 3)
    loss = FORMULAS[name][0]
    x.requires_grad_()
    whole = loss(PolicyOutputs(x), batch)
    (gradient,) = torch.autograd.grad(whole.loss, x)
    assert torch.equal(gradient != 0, batch["action_mask"])
    parts = []
    for rows in ([4, 5, 0, 1], [2, 3]):
        part = batch.select(rows)
        tokens = torch.cat([torch.arange(batch.offsets[row], batch.offsets[row + 1]) for row in rows])
        parts.append(loss(PolicyOutputs(x.detach()[tokens]), part))
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    for metric, (total, count) in whole.metrics.items():
        assert sum(part.metrics[metric][0].item() for part in parts) == pytest.approx(total.item()), metric
        assert sum(part.metrics[metric][1].item() for part in parts) == count, metric


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_pushes_the_chosen_answer_up_and_is_finite_far_away(name: str) -> None:
    batch, x = ragged([(1, 2), (1, 3)], 0)
    loss = FORMULAS[name][0]
    for shift in (0.0, 1e4, -1e4):
        y = torch.where(batch["action_mask"], x, 0.0)
        y[batch.offsets[1] :] += shift
        y.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(PolicyOutputs(y), batch).loss, y)
        assert gradient.isfinite().all()
        if shift == 0.0:
            assert (gradient[1 : batch.offsets[1]] < 0).all() and (gradient[batch.offsets[1] + 1 :] > 0).all()


def test_at_the_start_dpo_is_log_2_and_nothing_is_won() -> None:
    batch, x = ragged([(1, 2), (1, 3), (2, 2), (2, 4)], 1)
    batch = batch.with_columns(reference_log_prob=answer_log_probs(x, batch).float())
    out = PolicyPairLoss(Logistic(SMOOTHING), ImplicitReward(BETA))(PolicyOutputs(x.float()), batch)
    assert out.loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert out.metrics["reward/chosen"][0].item() == pytest.approx(0.0, abs=1e-6)


def test_what_is_no_pair_or_has_no_reference_is_refused() -> None:
    batch, x = ragged([(1, 2), (1, 3), (1, 1)], 0)
    with pytest.raises(ValueError, match="not whole pairs"):
        FORMULAS["dpo"][0](PolicyOutputs(x), batch)
    batch, x = ragged([(1, 2), (1, 3)], 0)
    with pytest.raises(Exception, match="reference_log_prob"):
        FORMULAS["dpo"][0](PolicyOutputs(x), batch.without("reference_log_prob"))
    assert FORMULAS["simpo"][0](PolicyOutputs(x), batch.without("reference_log_prob")).loss.isfinite()
