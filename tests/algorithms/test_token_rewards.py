"""A score lands at the last action; token rewards add up to the score minus the penalty."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.kl import token_kl
from rlhf_ray.algorithms.masked import segment_sum
from rlhf_ray.algorithms.token_rewards import make_token_rewards, place_scores


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_a_score_stands_at_the_last_action_and_nowhere_else(ragged, lengths, seed) -> None:
    batch = ragged(lengths, seed)
    placed = place_scores(batch["score"], batch["action_mask"], batch.offsets).tolist()
    expected = [0.0] * batch.num_tokens
    for row in range(len(batch)):
        actions = [t for t in range(int(batch.offsets[row]), int(batch.offsets[row + 1])) if batch["action_mask"][t]]
        if actions:
            expected[actions[-1]] = batch["score"][row].item()
    assert placed == expected


def test_tokens_after_the_last_action_get_nothing() -> None:
    mask = torch.tensor([False, True, False, True, False, False, False])
    placed = place_scores(torch.tensor([2.0, math.nan]), mask, torch.tensor([0, 5, 7]))
    assert placed.tolist() == [0, 0, 0, 2, 0, 0, 0]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31), coefficient=st.floats(0, 2)
)
def test_token_rewards_add_up_to_the_score_minus_the_penalty(ragged, lengths, seed, coefficient) -> None:
    batch = ragged(lengths, seed)
    mask, offsets = batch["action_mask"], batch.offsets
    kl = token_kl(batch["log_probs"], batch["reference_log_probs"], mask)
    rewards = make_token_rewards(batch["score"], kl, mask, offsets, kl_coefficient=coefficient)
    acted = segment_sum(mask.long(), offsets) > 0
    expected = torch.where(acted, batch["score"], 0.0) - coefficient * segment_sum(kl, offsets)
    torch.testing.assert_close(segment_sum(rewards, offsets), expected, atol=1e-5, rtol=1e-5)


def test_the_penalty_stands_at_its_own_token_and_masked_kl_has_no_influence() -> None:
    mask = torch.tensor([False, True, False, True])
    kl = torch.tensor([math.nan, 0.5, math.inf, -1.0])
    rewards = make_token_rewards(torch.tensor([3.0]), kl, mask, torch.tensor([0, 4]), kl_coefficient=0.1)
    assert rewards.tolist() == pytest.approx([0.0, -0.05, 0.0, 3.1])


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_a_spread_score_is_equal_parts_that_add_up(ragged, lengths, seed) -> None:
    batch = ragged(lengths, seed)
    mask, offsets = batch["action_mask"], batch.offsets
    placed = place_scores(batch["score"], mask, offsets, "spread")
    acted = segment_sum(mask.long(), offsets) > 0
    torch.testing.assert_close(segment_sum(placed, offsets), torch.where(acted, batch["score"], 0.0))
    for row in range(len(batch)):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        assert len(set(placed[part][mask[part]].tolist())) <= 1
        assert (placed[part][~mask[part]] == 0).all()


@pytest.mark.usefixtures("outside_pytest")
def test_shapes_that_would_broadcast_are_refused() -> None:
    mask, offsets = torch.tensor([False, True]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"score has shape \(2,\)"):
        place_scores(torch.zeros(2), mask, offsets)
    with pytest.raises(ValueError, match=r"kl has shape \(1,\)"):
        make_token_rewards(torch.zeros(1), torch.zeros(1), mask, offsets, kl_coefficient=1.0)
    with pytest.raises(ValueError, match="placement 'first' is unknown: use last_action or spread"):
        place_scores(torch.zeros(1), mask, offsets, "first")
