"""Ties count one half; what is not finite is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import NumericalError, RequestError
from rlhf_ray.evaluation import accuracy, tie_rate, win_rate

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=40)
@given(pairs=PAIRS)
def test_rates_are_counts_over_pairs(pairs) -> None:
    chosen, rejected = zip(*pairs, strict=True)
    expected = sum(1 if c > r else 0.5 if c == r else 0 for c, r in pairs) / len(pairs)
    assert accuracy(chosen, rejected) == win_rate(chosen, rejected) == pytest.approx(expected)
    assert tie_rate(chosen, rejected) == pytest.approx(sum(c == r for c, r in pairs) / len(pairs))
    assert win_rate(rejected, chosen) == pytest.approx(1 - expected)


def test_a_model_with_one_answer_to_everything_has_one_half() -> None:
    assert accuracy([1.5] * 7, [1.5] * 7) == 0.5
    assert tie_rate([1.5] * 7, [1.5] * 7) == 1.0


@pytest.mark.parametrize("figure", [accuracy, win_rate, tie_rate])
def test_scores_that_cannot_be_compared_are_refused(figure) -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(NumericalError, match=rf"\[1\] is {bad}"):
            figure([0.0, bad], [0.0, 0.0])
        with pytest.raises(NumericalError, match=rf"\[0\] is {bad}"):
            figure([0.0, 0.0], [bad, 0.0])
    with pytest.raises(RequestError, match=r"give a list of one score or more"):
        figure([], [])
    with pytest.raises(RequestError, match=r"has 1 scores, but .* has 2"):
        figure([1.0], [1.0, 2.0])
