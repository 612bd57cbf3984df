"""Rank correlation and flips of order against their definitions, pair by pair and by counting."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation import pair_order, rank_correlation


def slow_rank(values: list[float], value: float) -> float:
    """1 for the smallest; equal values share the mean of their ranks."""
    return sum(one < value for one in values) + (sum(one == value for one in values) + 1) / 2


def slow_correlation(one: list[float], other: list[float]) -> float:
    first, second = ([slow_rank(values, value) for value in values] for values in (one, other))
    middle = (len(one) + 1) / 2
    together = sum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    alone = sum((a - middle) ** 2 for a in first) * sum((b - middle) ** 2 for b in second)
    return together / alone**0.5


@pytest.mark.parametrize("seed", range(5))
def test_against_definitions(seed: int) -> None:
    draw = random.Random(seed)
    one, other = ([draw.choice([0.0, 0.5, draw.random(), -draw.random()]) for _ in range(12)] for _ in range(2))
    assert rank_correlation(one, other) == pytest.approx(slow_correlation(one, other), abs=1e-12)
    pairs = [*combinations(range(12), 2)]
    ordered = [(a, b) for a, b in pairs if one[a] != one[b] and other[a] != other[b]]
    flipped = [(a, b) for a, b in ordered if (one[a] < one[b]) != (other[a] < other[b])]
    assert pair_order(one, other) == (len(ordered), len(flipped))


def test_a_figure_of_nothing_is_none_and_other_lengths_are_refused() -> None:
    assert rank_correlation([1.0], [2.0]) is None
    assert rank_correlation([1.0, 1.0], [2.0, 3.0]) is None
    assert pair_order([1.0, 1.0], [2.0, 3.0]) == (0, 0)
    assert rank_correlation([1, 2, 3], [9, 8, 7]) == pytest.approx(-1.0)
    with pytest.raises(RequestError, match="2 values of one reward and 3 of the other"):
        pair_order([1, 2], [1, 2, 3])
