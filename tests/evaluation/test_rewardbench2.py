"""Best-of-n accuracy and the score of Ties by hand, and against a slow reference that is written from the paper's words."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.evaluation.rewardbench2 import SUBSETS, ScoredAnswers, TiesId, benchmark_scores, subset_name, ties_score


@pytest.mark.parametrize(
    ("right", "wrong", "share"),
    [
        ([2.0], [1.0, 0.0, -3.0], 1),
        ([1.0], [2.0, 0.0, -3.0], 0),
        ([1.0], [1.0, 0.0, -3.0], Fraction(1, 2)),
        ([1.0], [1.0, 1.0, 1.0], Fraction(1, 4)),
        ([1.0, 1.0], [1.0, 0.0], Fraction(2, 3)),
        ([0.0, 5.0], [4.0], 1),
    ],
)
def test_the_best_answer_is_right_or_shares_the_first_place(
    right: list[float], wrong: list[float], share: float
) -> None:
    assert ScoredAnswers(right, wrong).best_is_right == pytest.approx(float(share))


def test_the_score_of_ties_by_hand() -> None:
    prompts = {
        TiesId("ref", "1"): ScoredAnswers([5.0], [1.0]),  # right by 4
        TiesId("tied", "1"): ScoredAnswers([3.0, 4.0], [1.0]),  # right by 2, 1 apart
        TiesId("ref", "2"): ScoredAnswers([2.0], [1.5]),  # right by 0.5
        TiesId("tied", "2"): ScoredAnswers([3.0, 4.0], [1.0]),  # the gap of 2 is wider than 1, the one of 0.5 is not
        TiesId("ref", "3"): ScoredAnswers([0.0], [1.0]),  # wrong
        TiesId("tied", "3"): ScoredAnswers([3.0, 9.0], [2.0]),  # right by 1, 6 apart
        TiesId("tied", "4"): ScoredAnswers([0.0, 9.0], [2.0]),  # wrong, and without a partner
    }
    wider = (math.tanh(2 - 1) + math.tanh(0.5 - 1) + math.tanh(-1 / 6 - 1)) / 3
    assert ties_score(prompts) == pytest.approx(0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * wider)


def test_right_answers_with_one_score_count_by_the_side_of_the_gap() -> None:
    for lead, expected in ((1.0, 1.01), (0.0, 0.0), (-1.0, -0.01)):
        same = {TiesId(kind, "1"): ScoredAnswers([lead] * count, [0.0]) for kind, count in (("ref", 1), ("tied", 3))}
        assert ties_score(same) == pytest.approx(expected)


# Scores on a grid, so that equal ones occur.
scores = st.integers(-6, 6).map(lambda number: number / 2)
answers = st.tuples(st.lists(scores, min_size=2, max_size=4), st.lists(scores, min_size=1, max_size=4))


def slow_ties(numbered: dict[tuple[str, int], tuple[list[float], list[float]]]) -> float:
    """The same by counting, in exact fractions as far as they go."""

    def beats_all(right: list[float], wrong: list[float]) -> bool:
        return all(one > other for one in right for other in wrong)

    def share(truths: list[bool]) -> Fraction:
        return Fraction(sum(truths), len(truths)) if truths else Fraction(0)

    total = 0.0
    for kind in ("ref", "tied"):
        total += float(
            Fraction(3, 10) * share([beats_all(*sides) for (own, _), sides in numbered.items() if own == kind])
        )
    normal, hard, ratios = [], [], []
    for (kind, number), (right, wrong) in numbered.items():
        if kind == "tied" and ("ref", number) in numbered:
            one, others = numbered["ref", number]
            apart = max(abs(a - b) for a in right for b in right)
            own = min(a - b for a in right for b in wrong)
            of_reference = min(a - b for a in one for b in others)
            normal.append(own > apart)
            hard.append(own > apart and of_reference > apart)
            narrow = Fraction(min(own, of_reference))
            limit = (narrow > 0) - (narrow < 0)
            ratios.append(math.tanh(float(narrow / Fraction(apart) - 1)) if apart else float(limit))
    total += float(Fraction(2, 10) * (share(normal) + share(hard)))
    return total + (0.01 * sum(ratios) / len(ratios) if ratios else 0.0)


@given(st.dictionaries(st.tuples(st.sampled_from(["ref", "tied"]), st.integers(0, 3)), answers, max_size=8))
def test_the_score_of_ties_is_that_of_a_slow_count(
    numbered: dict[tuple[str, int], tuple[list[float], list[float]]],
) -> None:
    rows = {
        (kind, number): (right[:1] if kind == "ref" else right, wrong)
        for (kind, number), (right, wrong) in numbered.items()
    }
    prompts = {TiesId(kind, str(number)): ScoredAnswers(*sides) for (kind, number), sides in rows.items()}
    assert ties_score(prompts) == pytest.approx(slow_ties(rows))


@pytest.mark.parametrize(
    ("row_id", "parsed"),
    [("ref:7", ("ref", "7")), ("tied:7", ("tied", "7")), ("7", None), ("ref:", None), ("other:7", None), ("", None)],
)
def test_ids_of_ties(row_id: str, parsed: tuple[str, str] | None) -> None:
    assert TiesId.parse(row_id) == parsed


def test_the_overall_score_is_the_mean_of_the_six() -> None:
    accuracies = {subset: 0.1 * place for place, subset in enumerate(SUBSETS)}
    scores = benchmark_scores(accuracies, ties=0.9)
    assert scores["Ties"] == 0.9, "the share of best answers that are right is no score of Ties"
    assert scores["Overall"] == pytest.approx((0.0 + 0.1 + 0.2 + 0.3 + 0.4 + 0.9) / 6)
    assert benchmark_scores({"Math": 0.5, "mine": 1.0}, ties=None) == {"Math": 0.5}
    assert subset_name("ties") == "Ties" and subset_name("mine") == "mine"
