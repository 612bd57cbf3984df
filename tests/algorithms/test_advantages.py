"""The recursion runs over the actions alone: gaps, masked tokens and neighbours in the batch play no part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.trajectories.batch import TrajectoryBatch

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
RATES = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)


def run(
    batch: TrajectoryBatch, gamma: float, lam: float, *, bootstrap: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    return gae(
        batch["token_rewards"], batch["values"], batch["action_mask"], batch.offsets,
        gamma=gamma, lam=lam, bootstrap_value=batch["bootstrap_value"] if bootstrap else None,
    )  # fmt: skip


def slow_gae(batch: TrajectoryBatch, gamma: float, lam: float, *, bootstrap: bool) -> tuple[list[float], list[float]]:
    """The recursion of the paper, sequence by sequence, from the last action to the first."""
    rewards, values, mask = (batch[name].tolist() for name in ("token_rewards", "values", "action_mask"))
    advantages, returns = [0.0] * batch.num_tokens, [0.0] * batch.num_tokens
    for row in range(len(batch)):
        following = batch["bootstrap_value"][row].item() if bootstrap else 0.0
        carry = 0.0
        for t in reversed(range(int(batch.offsets[row]), int(batch.offsets[row + 1]))):
            if mask[t]:
                carry = rewards[t] + gamma * following - values[t] + gamma * lam * carry
                following = values[t]
                advantages[t], returns[t] = carry, carry + values[t]
    return advantages, returns


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, seed=SEEDS, gamma=RATES, lam=RATES, bootstrap=st.booleans())
def test_equals_the_recursion_over_the_actions(ragged, lengths, seed, gamma, lam, bootstrap) -> None:
    batch = ragged(lengths, seed)
    advantages, returns = run(batch, gamma, lam, bootstrap=bootstrap)
    expected_advantages, expected_returns = slow_gae(batch, gamma, lam, bootstrap=bootstrap)
    assert advantages.tolist() == pytest.approx(expected_advantages, abs=1e-5)
    assert returns.tolist() == pytest.approx(expected_returns, abs=1e-5)
    assert advantages.dtype == returns.dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, gamma=RATES, lam=RATES)
def test_gaps_change_nothing(ragged, lengths, seed, gamma, lam) -> None:
    """Deleting every token that is not an action (but the first of each sequence) gives the same numbers, bit for bit."""
    batch = ragged(lengths, seed)
    mask = batch["action_mask"]
    kept = mask.clone()
    kept[batch.offsets[:-1]] = True
    sizes = [int(part.sum()) for part in kept.split(lengths)]
    dense = TrajectoryBatch.from_sequences([[0] * size for size in sizes], action_mask=mask[kept]).with_columns(
        token_rewards=batch["token_rewards"][kept],
        values=batch["values"][kept],
        bootstrap_value=batch["bootstrap_value"],
    )
    for with_gaps, without in zip(run(batch, gamma, lam), run(dense, gamma, lam), strict=True):
        assert torch.equal(with_gaps[mask], without[dense["action_mask"]])


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=SEEDS, bootstrap=st.booleans())
def test_without_decay_the_return_is_the_sum_of_what_follows(ragged, lengths, seed, bootstrap) -> None:
    """gamma = lambda = 1: Monte Carlo, so advantages are returns minus values."""
    batch = ragged(lengths, seed)
    mask = batch["action_mask"]
    advantages, returns = run(batch, 1.0, 1.0, bootstrap=bootstrap)
    for row, part in enumerate(batch.with_columns(returns=returns).select([row]) for row in range(len(batch))):
        end = batch["bootstrap_value"][row] if bootstrap else 0.0
        rewards = part["token_rewards"][part["action_mask"]]
        following = rewards.flip(0).cumsum(0).flip(0) + end
        torch.testing.assert_close(part["returns"][part["action_mask"]], following, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(advantages[mask], (returns - batch["values"])[mask])


@settings(deadline=None, max_examples=20)
@given(lengths=LENGTHS, seed=SEEDS, lam=RATES)
def test_a_perfect_critic_leaves_no_advantage(ragged, lengths, seed, lam) -> None:
    batch = ragged(lengths, seed)
    _, returns = run(batch, 0.9, 1.0)
    advantages, again = run(batch.with_columns(values=returns), 0.9, lam)
    assert advantages.abs().max().item() < 1e-5
    torch.testing.assert_close(again, returns, atol=1e-5, rtol=1e-5)


def test_two_turns_by_hand() -> None:
    """Two turns of two tokens around an answer of the environment; constant value 0.5, reward 1 at the end."""
    mask = torch.tensor([False, True, True, False, False, True, True])
    rewards = torch.tensor([0.0, 0, 0, 0, 0, 0, 1])
    advantages, returns = gae(rewards, torch.full((7,), 0.5), mask, torch.tensor([0, 7]), gamma=1.0, lam=0.95)
    assert advantages.tolist() == pytest.approx([0, 0.5 * 0.95**3, 0.5 * 0.95**2, 0, 0, 0.5 * 0.95, 0.5])
    assert returns[mask].tolist() == pytest.approx((advantages[mask] + 0.5).tolist())


def test_a_cut_answer_counts_as_ended_unless_it_is_bootstrapped() -> None:
    mask, zeros = torch.tensor([False, True]), torch.zeros(2)
    ended, _ = gae(zeros, zeros, mask, torch.tensor([0, 2]), gamma=0.5, lam=1.0)
    cut, _ = gae(zeros, zeros, mask, torch.tensor([0, 2]), gamma=0.5, lam=1.0, bootstrap_value=torch.tensor([3.0]))
    assert (ended[1].item(), cut[1].item()) == (0.0, 1.5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_tokens_have_no_influence(ragged, poison) -> None:
    clean, dirty = ragged([5, 1, 9, 2], 7), ragged([5, 1, 9, 2], 7, poison=poison)
    for expected, result in zip(run(clean, 0.9, 0.8), run(dirty, 0.9, 0.8), strict=True):
        assert torch.equal(expected, result)
        assert (result[~dirty["action_mask"]] == 0).all()


def test_nan_at_an_action_stays_in_its_sequence_and_before_it(ragged) -> None:
    batch = ragged([9, 9, 9], 3)
    actions = [t for t in batch["action_mask"].nonzero()[:, 0].tolist() if 9 <= t < 18]
    values = batch["values"].clone()
    values[actions[1]] = math.nan
    advantages, _ = run(batch.with_columns(values=values), 0.9, 0.8)
    assert advantages.isnan().nonzero()[:, 0].tolist() == actions[:2]


@settings(deadline=None, max_examples=20)
@given(data=st.data(), lengths=LENGTHS, seed=SEEDS)
def test_the_order_of_sequences_is_nothing(ragged, data, lengths, seed) -> None:
    batch = ragged(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    advantages, returns = run(batch, 0.9, 0.8)
    expected = batch.with_columns(advantages=advantages, returns=returns).select(order)
    permuted = run(batch.select(order), 0.9, 0.8)
    assert torch.equal(permuted[0], expected["advantages"])
    assert torch.equal(permuted[1], expected["returns"])


def test_no_actions_and_no_sequences() -> None:
    nothing = torch.zeros(2, dtype=torch.bool)
    advantages, returns = gae(
        torch.zeros(2), torch.full((2,), math.nan), nothing, torch.tensor([0, 1, 2]), gamma=1.0, lam=1.0
    )
    assert advantages.tolist() == returns.tolist() == [0.0, 0.0]
    empty = torch.zeros(0)
    assert gae(empty, empty, empty.bool(), torch.tensor([0]), gamma=1.0, lam=1.0)[0].shape == (0,)


def test_inputs_stay_as_they_were(ragged) -> None:
    batch, twin = ragged([5, 4], 11), ragged([5, 4], 11)
    run(batch, 0.9, 0.8)
    assert all(torch.equal(batch[column], twin[column]) for column in batch.columns)


@pytest.mark.usefixtures("outside_pytest")
def test_shapes_that_would_broadcast_are_refused() -> None:
    mask, offsets = torch.tensor([False, True]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"token_rewards has shape \(1,\)"):
        gae(torch.zeros(1), torch.zeros(2), mask, offsets, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"bootstrap_value has shape \(2,\)"):
        gae(torch.zeros(2), torch.zeros(2), mask, offsets, gamma=1.0, lam=1.0, bootstrap_value=torch.zeros(2))
