"""Baselines from the other answers to a prompt: closed forms, and what never moves them."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.advantages import AgainstGroup
from rlhf_ray.algorithms.group_baselines import group_baseline, without_signal
from rlhf_ray.algorithms.kl import kl_loss

BASELINES = ("leave_one_out", "group_mean", "group_norm")
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(-8, 8)), min_size=1, max_size=14)
"""(group, reward in eighths)."""


def by_hand(rewards: list[float], group: list[int], baseline: str, *, unbiased: bool = True) -> list[float]:
    advantages = []
    for row, (reward, mine) in enumerate(zip(rewards, group, strict=True)):
        members = [value for value, other in zip(rewards, group, strict=True) if other == mine]
        others = [value for at, value in enumerate(rewards) if group[at] == mine and at != row]
        if len(members) == 1:
            advantages.append(0.0)
        elif baseline == "leave_one_out":
            advantages.append(reward - statistics.fmean(others))
        else:
            difference = reward - statistics.fmean(members)
            deviation = statistics.stdev(members) if unbiased else statistics.pstdev(members)
            advantages.append(difference if baseline == "group_mean" else difference / (deviation + 1e-6))
    return advantages


def run(rewards: list[float], group: list[int], baseline: str, **options: bool) -> torch.Tensor:
    counted = torch.ones(len(rewards), dtype=torch.bool)
    return group_baseline(torch.tensor(rewards), torch.tensor(group), counted, baseline, **options)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, baseline=st.sampled_from(BASELINES), unbiased=st.booleans())
def test_equals_the_formula_group_by_group(rows, baseline, unbiased) -> None:
    group, rewards = [row[0] for row in rows], [row[1] / 8 for row in rows]
    advantages = run(rewards, group, baseline, unbiased=unbiased)
    assert advantages.tolist() == pytest.approx(
        by_hand(rewards, group, baseline, unbiased=unbiased), abs=1e-6, rel=1e-6
    )


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, baseline=st.sampled_from(BASELINES), data=st.data())
def test_the_order_of_answers_and_the_names_of_prompts_are_nothing(rows, baseline, data) -> None:
    group, rewards = [row[0] for row in rows], [row[1] / 8 for row in rows]
    order = data.draw(st.permutations(range(len(rows))))
    expected = run(rewards, group, baseline)[order]
    advantages = run([rewards[row] for row in order], [1000 - 7 * group[row] for row in order], baseline)
    torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("reward", [0.1, -0.3, 1e6 / 3])
def test_equal_rewards_give_exactly_nothing(baseline, reward) -> None:
    """In float32 the mean of three times 0.1 is not 0.1, and a division by an epsilon would make 7 of the difference."""
    assert run([reward] * 3 + [5.0], [1, 1, 1, 2], baseline).tolist() == [0.0] * 4


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_an_answer_that_does_not_count_moves_nobody(baseline, poison) -> None:
    counted = torch.tensor([True, True, False, True])
    advantages = group_baseline(torch.tensor([1.0, 0.0, poison, 0.5]), torch.zeros(4).long(), counted, baseline)
    expected = run([1.0, 0.0, 0.5], [0, 0, 0], baseline)
    assert advantages[counted].tolist() == pytest.approx(expected.tolist())
    assert advantages[2] == 0.0


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_nan_stays_in_its_group(baseline) -> None:
    advantages = run([math.nan, 1.0, 1.0, 0.0, math.nan], [0, 0, 1, 1, 2], baseline)
    assert advantages.isnan().tolist() == [True, True, False, False, True]


def test_what_tells_no_answers_apart_is_named() -> None:
    rewards, group = torch.tensor([0.1, 0.1, 0.0, 1.0, 3.0, 1.0]), torch.tensor([5, 5, 6, 6, 7, 7])
    counted = torch.tensor([True, True, True, True, True, False])
    assert without_signal(rewards, group, counted).tolist() == [True, True, False, False, True, True]
    assert not without_signal(torch.tensor([math.nan, 1.0]), torch.zeros(2).long(), torch.ones(2).bool()).any()


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("baseline", BASELINES)
def test_an_answers_reward_is_all_its_token_rewards_and_goes_to_all_its_actions(
    ragged, baseline, lengths, seed
) -> None:
    """A KL penalty in the token rewards is part of what is compared; answers without an action are not."""
    batch = ragged(lengths, seed, poison=math.nan)
    batch = batch.with_columns(prompt_id=torch.arange(len(batch)) % 2)
    advantages, returns = AgainstGroup(baseline)(batch, batch["token_rewards"])
    assert returns is None
    mask, parts = batch["action_mask"], [batch.select([row]) for row in range(len(batch))]
    acted = [row for row, part in enumerate(parts) if part["action_mask"].any()]
    sums = [parts[row]["token_rewards"][parts[row]["action_mask"]].double().sum().item() for row in acted]
    expected = dict(zip(acted, by_hand(sums, [row % 2 for row in acted], baseline), strict=True))
    rows = batch.sequence_ids.tolist()
    wanted = [expected[row] if action else 0.0 for row, action in zip(rows, mask.tolist(), strict=True)]
    assert advantages.tolist() == pytest.approx(wanted, abs=1e-4, rel=1e-4)


@pytest.mark.usefixtures("outside_pytest")
def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline 'median' is unknown: use leave_one_out, group_mean or group_norm"):
        run([1.0], [0], "median")


@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize(
    ("baseline", "coefficient"),
    [("group_mean", lambda spread: spread / math.log(3)), ("group_norm", lambda spread: 2 / math.log(3))],
)
def test_the_best_policy_under_a_kl_in_the_loss(baseline, coefficient, spread) -> None:
    """One prompt, two answers of one token, an even reference, and a group of 4 which holds them as the policy (3/4, 1/4)
    draws them. The policy is p_ref exp(R / beta) where beta = spread / log 3. The deviation is half the spread, so that with
    ``group_norm`` it is the best where beta = 2 / log 3, whatever the spread: the KL weighs less where rewards are closer."""

    def gradient(beta: float) -> float:
        logits = torch.tensor([3.0, 1.0], dtype=torch.float64).log().requires_grad_()
        answers, everywhere = torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.bool)
        log_probs = logits.log_softmax(-1)[answers]
        advantages = group_baseline(
            torch.tensor([spread, 0.0], dtype=torch.float64)[answers],
            torch.zeros(4, dtype=torch.int64),
            everywhere,
            baseline,
        )
        reference, moved = torch.full_like(log_probs, math.log(0.5)), log_probs - log_probs.detach()
        kl = kl_loss(log_probs, moved, reference, everywhere, estimator="k3", gradient="unbiased")
        loss = (beta * kl - advantages * log_probs).mean()
        return float(torch.autograd.grad(loss, logits)[0][0])

    best = coefficient(spread)
    assert gradient(best) == pytest.approx(0, abs=1e-5)
    assert gradient(2 * best) > 1e-2 * spread and gradient(best / 2) < -1e-2 * spread
