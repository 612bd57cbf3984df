"""Comparisons and the scores that follow from them, against closed forms and slow references.

What must hold: each answer is compared, in both orders or first in half of its comparisons; scores depend on verdicts alone.
"""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest

from rlhf_ray.rewards.judge.ranking import Compare, Comparison, comparisons, scores


@pytest.mark.parametrize("compare", ["pairs", "circle", "all"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16])
def test_each_answer_is_compared_and_no_order_is_favoured(compare: Compare, count: int) -> None:
    if compare == "pairs" and count % 2:
        with pytest.raises(ValueError, match="cannot be compared by pairs"):
            comparisons(count, compare, both_orders=True)
        return
    both, one = comparisons(count, compare, both_orders=True), comparisons(count, compare, both_orders=False)
    assert len(both) == len({*both}) == 2 * len(one) and {*both} == {*one} | {(b, a) for a, b in one}
    wanted = {"pairs": count // 2, "circle": count if count > 2 else 1, "all": math.comb(count, 2)}
    assert len({frozenset(met) for met in one}) == len(one) == wanted[compare]
    for answer in range(count):
        first, second = sum(met[0] == answer for met in one), sum(met[1] == answer for met in one)
        assert first + second > 0 and abs(first - second) <= 1


def test_a_win_share_is_the_share_of_the_comparisons_of_an_answer() -> None:
    verdicts = [Comparison(0, 1, 1.0), Comparison(1, 0, 0.0), Comparison(1, 2, 0.5), Comparison(2, 1, 0.0)]
    assert scores(3, verdicts, "win_share") == [1.0, 0.375, 0.25]


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (2, 0), (1.5, 0.5), (7, 3), (1, 1)])
def test_two_answers_differ_by_the_log_odds_of_their_wins_with_one_tie_more(won: float, lost: float) -> None:
    verdicts = [Comparison(0, 1, 1.0)] * int(won) + [Comparison(1, 0, 1.0)] * int(lost)
    verdicts += [Comparison(0, 1, 0.5)] * int(2 * (won % 1))
    one, two = scores(2, verdicts, "bradley_terry")
    assert one - two == pytest.approx(math.log((won + 0.5) / (lost + 0.5)), abs=1e-9) and one + two == pytest.approx(
        0.0
    )


def slow_strengths(count: int, verdicts: list[Comparison]) -> np.ndarray:
    """Minorisation and maximisation (Hunter 2004), which climbs to the same maximum in many small steps."""
    won = np.zeros((count, count))
    for one in verdicts:
        won[one.first, one.second] += one.share
        won[one.second, one.first] += 1.0 - one.share
    met = won + won.T
    won, met = won + 0.5 * (met > 0), met + (met > 0)
    worth = np.ones(count)
    for _ in range(100_000):
        new = won.sum(1) / (met / (worth[:, None] + worth[None, :])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / worth)).max() < 1e-13:
            break
        worth = new
    return np.log(worth)


@pytest.mark.parametrize("compare", ["circle", "all"])
@pytest.mark.parametrize("count", [2, 3, 6, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_strengths_are_those_of_a_slow_reference(compare: Compare, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    verdicts = [
        Comparison(first, second, float(draw.choice([0.0, 0.5, 1.0])))
        for first, second in comparisons(count, compare, both_orders=True)
    ]
    assert scores(count, verdicts, "bradley_terry") == pytest.approx(slow_strengths(count, verdicts), abs=1e-7)


@pytest.mark.parametrize("count", [16, 64])
def test_a_judge_that_never_errs_gives_finite_strengths_in_the_right_order(count: int) -> None:
    verdicts = [Comparison(one, two, 1.0) for one, two in combinations(range(count), 2)]
    strengths = scores(count, verdicts, "bradley_terry")
    assert strengths == sorted(strengths, reverse=True) and len({*strengths}) == count
    assert strengths == pytest.approx([-one for one in reversed(strengths)], abs=1e-8)
    assert scores(count, verdicts, "win_share") == pytest.approx([1 - n / (count - 1) for n in range(count)])


@pytest.mark.parametrize("ranking", ["win_share", "bradley_terry"])
def test_answers_in_another_order_keep_their_scores(ranking: str) -> None:
    verdicts = [Comparison(0, 1, 1.0), Comparison(1, 2, 0.5), Comparison(2, 3, 1.0), Comparison(3, 0, 0.0)]
    before = scores(4, verdicts, ranking)  # type: ignore[arg-type]
    for order in permutations(range(4)):
        moved = [Comparison(order[one.first], order[one.second], one.share) for one in verdicts]
        now = scores(4, moved, ranking)  # type: ignore[arg-type]
        assert [now[order[answer]] for answer in range(4)] == pytest.approx(before, abs=1e-9)
