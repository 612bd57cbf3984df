"""Each ranking against its closed form in high precision, stable far out, with the gradient of finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.rankings import Focal, Hinge, LogExp, Ordinal, Ranking, Scaled, Sigmoid

getcontext().prec = 120
THRESHOLDS = (0.5, 1.25, 3.0)
Closed = Callable[[Decimal, Decimal], Decimal]


def sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def focal(d: Decimal, m: Decimal) -> Decimal:
    p = sigmoid(d - m)
    return -((1 - 2 * max(Decimal(0), p - Decimal("0.5"))) ** 2) * p.ln()


def ordinal(d: Decimal, grade: Decimal) -> Decimal:
    t = [Decimal(0), *map(Decimal, THRESHOLDS)]
    k = int(grade)
    if k == 0:
        return -(sigmoid(d + t[1]) - sigmoid(d - t[1])).ln()
    above = sigmoid(d - t[k + 1]) if k + 1 < len(t) else Decimal(0)
    return -(sigmoid(d - t[k]) - above).ln()


RANKINGS: dict[str, tuple[Ranking, Closed]] = {
    "sigmoid": (Sigmoid(), lambda d, m: -sigmoid(d - m).ln()),
    "logexp": (LogExp(), lambda d, m: (1 + (m - d).exp()).ln()),
    "hinge": (Hinge(), lambda d, m: max(Decimal(0), m - d)),
    "focal": (Focal(2.0), focal),
    "scaled": (Scaled(), lambda d, m: -m * sigmoid(d).ln()),
    "ordinal": (Ordinal(THRESHOLDS), ordinal),
}


def both(name: str, difference: float, number: float, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """The loss of one pair, and what the closed form gives in 120 digits."""
    ranking, closed = RANKINGS[name]
    given_number = torch.tensor([number], dtype=dtype)
    loss = ranking(torch.tensor([difference], dtype=dtype), given_number).item()
    return loss, float(closed(Decimal(difference), Decimal(given_number.item())))


@pytest.mark.parametrize("name", RANKINGS)
@settings(deadline=None, max_examples=40)
@given(difference=st.floats(-60, 60), grade=st.integers(0, 3), margin=st.floats(0, 4))
def test_a_ranking_is_its_closed_form(name: str, difference: float, grade: int, margin: float) -> None:
    loss, expected = both(name, difference, grade if name == "ordinal" else margin)
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("difference", [-200.0, -100.0, 0.0, 100.0, 200.0])
@pytest.mark.parametrize("name", RANKINGS)
def test_far_out_a_ranking_is_finite_and_right_in_float32(name: str, difference: float) -> None:
    for number in (0, 1, 2, 3) if name == "ordinal" else (0.0, 1.5):
        loss, expected = both(name, difference, number, torch.float32)
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
        x = torch.tensor([difference], requires_grad=True)
        (slope,) = torch.autograd.grad(RANKINGS[name][0](x, torch.tensor([float(number)])).sum(), x)
        assert math.isfinite(slope.item()) and abs(slope.item()) <= 1.5 + 1e-6


@pytest.mark.parametrize("name", RANKINGS)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    ranking, _ = RANKINGS[name]
    difference = torch.tensor([-3.0, -0.4, 0.3, 2.2], dtype=torch.float64, requires_grad=True)
    number = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: ranking(d, number), (difference,))


def test_without_a_margin_it_is_0_and_for_the_hinge_its_own() -> None:
    difference = torch.tensor([0.7], dtype=torch.float64)
    for name, margin in (("sigmoid", 0.0), ("logexp", 0.0), ("focal", 0.0), ("hinge", 1.0)):
        ranking, closed = RANKINGS[name]
        assert ranking(difference, None).item() == pytest.approx(
            float(closed(Decimal("0.7"), Decimal(margin))), abs=1e-12
        )
    assert Hinge(2.5)(difference, None).item() == pytest.approx(1.8)


@settings(deadline=None, max_examples=30)
@given(difference=st.floats(-20, 20), thresholds=st.lists(st.floats(0.1, 3), min_size=1, max_size=4))
def test_the_odds_of_all_grades_are_one(difference: float, thresholds: list[float]) -> None:
    """Chosen better by each grade, a tie, and rejected better by each grade: one of them must happen."""
    steps = torch.tensor(thresholds, dtype=torch.float64).cumsum(0).tolist()
    ranking = Ordinal(tuple(steps))
    grades = torch.arange(len(steps) + 1, dtype=torch.float64)
    d = torch.full_like(grades, difference)
    odds = torch.cat([torch.exp(-ranking(d, grades)), torch.exp(-ranking(-d[1:], grades[1:]))])
    assert odds.sum().item() == pytest.approx(1.0, abs=1e-9)


def test_a_tie_is_likeliest_at_equal_scores_and_a_grade_between_its_thresholds() -> None:
    ranking, d = Ordinal((1.0, 3.0)), torch.linspace(-8, 8, 161, dtype=torch.float64)
    best = [d[ranking(d, torch.full_like(d, grade)).argmin()].item() for grade in (0, 1, 2)]
    assert best == pytest.approx([0.0, 2.0, 8.0])


@pytest.mark.parametrize("thresholds", [(), (0.0,), (1.0, 1.0), (2.0, 1.0), (-1.0, 2.0)])
def test_thresholds_that_do_not_ascend_above_0_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending numbers above 0"):
        Ordinal(thresholds)
