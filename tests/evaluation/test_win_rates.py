"""A tie counts half and a prompt as one; at equal lengths the regression gives the plain rate, and it is that of a slow
reference.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import NumericalError, RequestError
from rlhf_ray.evaluation import win_rates
from rlhf_ray.evaluation.win_rates import PRIOR, Meetings, length_controlled_win_rate, meet, paired_win_rate

REWARDS = st.lists(st.integers(0, 3).map(float), min_size=1, max_size=4)
PROMPTS = st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=5)


def met(pairs, lengths=None):
    """Meetings of ``pairs`` of rewards; all answers have one length where none are given."""
    a, b = zip(*pairs, strict=True)
    own, others = zip(*lengths, strict=True) if lengths else ([[1] * len(x) for x in a], [[1] * len(x) for x in b])
    return meet(a, b, own, others)


def longer_wins(prompts: int, effect: float, quality: float, seed: int = 0) -> Meetings:
    """One meeting a prompt, drawn from the model: the first policy writes longer answers, and length helps."""
    random = np.random.default_rng(seed)
    longer = random.normal(2.0, 1.0, prompts)
    chance = 1 / (1 + np.exp(-(quality + effect * np.tanh(longer / longer.std()))))
    wins = (random.random(prompts) < chance).astype(float)
    return Meetings(wins, longer, np.arange(prompts), prompts)


@settings(deadline=None, max_examples=60)
@given(PROMPTS)
def test_a_rate_is_the_mean_over_prompts_of_all_meetings_counted_one_by_one(pairs):
    rate = paired_win_rate(met(pairs))
    shares = []
    for one, other in pairs:
        outcomes = [1.0 if x > y else 0.5 if x == y else 0.0 for x in one for y in other]
        shares.append(
            (sum(outcomes) / len(outcomes), [outcomes.count(value) / len(outcomes) for value in (1.0, 0.5, 0.0)])
        )
    assert rate.rate == pytest.approx(np.mean([share for share, _ in shares]))
    assert [rate.wins, rate.ties, rate.losses] == pytest.approx(np.mean([counts for _, counts in shares], axis=0))
    assert rate.wins + rate.ties + rate.losses == pytest.approx(1.0)
    assert 0.0 <= rate.interval[0] <= rate.rate <= rate.interval[1] <= 1.0


def test_a_prompt_with_many_answers_counts_as_much_as_one_with_one():
    rate = paired_win_rate(met([([1.0], [0.0]), ([0.0] * 3, [1.0] * 5)]))
    assert rate.rate == 0.5


def test_more_of_the_same_answers_to_a_prompt_change_no_rate_and_no_interval():
    """Neither of one prompt among others: in how far lengths differ it counts as one too."""
    pairs, lengths = [([1.0, 0.0], [0.0]), ([0.0], [1.0]), ([1.0], [0.0])], [([10, 50], [9]), ([20], [30]), ([5], [70])]
    few, many = (
        met(pairs, lengths),
        met([(pairs[0][0] * 20, [0.0] * 3), *pairs[1:]], [([10, 50] * 20, [9] * 3), *lengths[1:]]),
    )
    controlled, same = length_controlled_win_rate(few), length_controlled_win_rate(many)
    assert (controlled.rate, *controlled.interval) == pytest.approx((same.rate, *same.interval), abs=1e-6)
    assert controlled.length_effect == pytest.approx(same.length_effect, abs=1e-6)
    assert paired_win_rate(few).interval == pytest.approx(paired_win_rate(many).interval)


@settings(deadline=None, max_examples=25)
@given(PROMPTS, st.integers(0, 100))
def test_swapping_the_policies_turns_every_rate_around(pairs, seed):
    random = np.random.default_rng(seed)
    lengths = [(random.integers(1, 50, len(one)), random.integers(1, 50, len(other))) for one, other in pairs]
    there, back = met(pairs, lengths), met([pair[::-1] for pair in pairs], [pair[::-1] for pair in lengths])
    assert paired_win_rate(there).rate == pytest.approx(1 - paired_win_rate(back).rate)
    controlled, turned = length_controlled_win_rate(there), length_controlled_win_rate(back)
    assert controlled.rate == pytest.approx(1 - turned.rate, abs=1e-6)
    assert controlled.length_effect == pytest.approx(turned.length_effect, abs=1e-5)


def test_a_policy_against_itself_has_one_half():
    random = np.random.default_rng(3)
    rewards, lengths = [random.normal(size=4) for _ in range(20)], [random.integers(1, 99, 4) for _ in range(20)]
    meetings = meet(rewards, rewards, lengths, lengths)
    assert paired_win_rate(meetings).rate == pytest.approx(0.5)
    assert length_controlled_win_rate(meetings).rate == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_at_equal_lengths_the_controlled_rate_is_the_plain_one(share):
    wins = np.repeat([1.0, 0.0], [int(400 * share), 400 - int(400 * share)])
    meetings = Meetings(wins, np.zeros(400), np.arange(400), 400)
    assert length_controlled_win_rate(meetings).rate == pytest.approx(share, abs=1e-4)
    assert paired_win_rate(meetings).rate == pytest.approx(share)


def slow_fit(meetings: Meetings) -> tuple[float, float]:
    """The same regression by another method: torch's LBFGS over the penalised likelihood, meeting by meeting."""
    y, weight = torch.tensor(meetings.wins), torch.tensor(meetings.weights)
    longer = torch.tensor(meetings.longer)
    middle = (weight * longer).sum() / meetings.prompts
    x = torch.tanh(longer / ((weight * (longer - middle).square()).sum() / meetings.prompts).sqrt())
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = parameters[0] + parameters[1] * x
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weight=weight, reduction="sum")
        value = value + PRIOR / 2 * parameters.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return parameters[0].item(), parameters[1].item()


@pytest.mark.parametrize("seed", range(4))
def test_the_regression_is_that_of_a_slow_reference_also_with_several_answers(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 4, (30, 2))
    a, b = ([random.integers(0, 4, size).astype(float) for size in sizes[:, side]] for side in (0, 1))
    lengths = [[random.integers(1, 200, len(each)) for each in side] for side in (a, b)]
    meetings = meet(a, b, *lengths)
    intercept, effect = slow_fit(meetings)
    found = length_controlled_win_rate(meetings)
    assert found.rate == pytest.approx(1 / (1 + math.exp(-intercept)), abs=1e-6)
    assert found.length_effect == pytest.approx(effect, abs=1e-5)


def test_a_policy_that_wins_by_length_alone_loses_its_lead_and_one_that_is_better_keeps_it():
    by_length, better = longer_wins(4000, effect=2.0, quality=0.0), longer_wins(4000, effect=0.0, quality=1.0)
    assert paired_win_rate(by_length).rate > 0.8
    controlled = length_controlled_win_rate(by_length)
    assert controlled.interval[0] < 0.5 < controlled.interval[1] and controlled.length_effect == pytest.approx(
        2.0, abs=0.6
    )
    assert length_controlled_win_rate(better).rate == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.08)


def test_where_one_policy_always_wins_the_rate_is_near_one_and_finite():
    meetings = Meetings(np.ones(200), np.linspace(-5, 5, 200), np.arange(200), 200)
    found = length_controlled_win_rate(meetings)
    assert 0.99 < found.rate < 1.0 and found.interval[1] <= 1.0
    separated = Meetings((np.arange(200) >= 100).astype(float), np.arange(-100.0, 100.0), np.arange(200), 200)
    assert length_controlled_win_rate(separated).rate == pytest.approx(0.5, abs=0.1)


def test_an_interval_holds_the_true_rate_about_as_often_as_it_says():
    truth, inside = 1 / (1 + math.exp(-0.5)), []
    for seed in range(100):
        found = length_controlled_win_rate(longer_wins(150, effect=0.7, quality=0.5, seed=seed), seed=seed)
        inside.append(found.interval[0] <= truth <= found.interval[1])
    assert 0.88 <= np.mean(inside) <= 1.0


@pytest.mark.parametrize(
    ("lists", "error", "problem"),
    [
        (([], [], [], []), RequestError, "rewards and lengths of 0, 0, 0, 0 prompts"),
        (([[1.0]], [[1.0], [2.0]], [[1]], [[1]]), RequestError, "rewards and lengths of 1, 2, 1, 1 prompts"),
        (([[1.0]], [[1.0]], [[1, 2]], [[1]]), RequestError, "prompt 0 has rewards and lengths of another number"),
        (([[math.nan]], [[1.0]], [[1]], [[1]]), NumericalError, "only finite scores can be compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(lists, error, problem):
    with pytest.raises(error, match=problem):
        meet(*lists)


def test_a_regression_that_does_not_converge_is_said(monkeypatch):
    monkeypatch.setattr(win_rates, "ROUNDS", 1)
    with pytest.raises(NumericalError, match="did not converge in 1 rounds"):
        length_controlled_win_rate(longer_wins(50, effect=1.0, quality=1.0))


@pytest.mark.parametrize("reward", [1.0, -1.0, 0.0])
def test_a_rate_without_any_exception_is_as_uncertain_as_its_number_of_prompts(reward):
    """Drawing prompts again shows nothing, whatever their lengths: twenty wins of twenty are no 100 % of all prompts."""
    random = np.random.default_rng(0)
    lengths = [([one], [other]) for one, other in random.integers(10, 90, (20, 2))]
    meetings = met([([reward], [0.0])] * 20, lengths)
    plain, controlled = paired_win_rate(meetings), length_controlled_win_rate(meetings)
    assert controlled.interval[0] <= plain.interval[0] and plain.interval[1] <= controlled.interval[1]
    assert controlled.interval[1] - controlled.interval[0] > 0.15
