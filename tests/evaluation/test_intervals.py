"""Wilson's interval against its defining equation, at whose ends the share lies z standard errors away; the bootstrap's against
drawing prompts one by one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.intervals import Z_95, draw_prompts, mean_interval, share_interval, wilson_interval


@pytest.mark.parametrize(("share", "count"), [(0.5, 100), (0.9, 20), (0.013, 1000), (1 / 3, 3)])
def test_at_its_ends_the_share_lies_z_standard_errors_away(share: float, count: int) -> None:
    for end in wilson_interval(share, count):
        assert abs(share - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / count), rel=1e-9)


def test_it_holds_the_share_where_nothing_or_all_was_counted() -> None:
    assert wilson_interval(0.0, 10) == (0.0, pytest.approx(Z_95**2 / (10 + Z_95**2)))
    assert wilson_interval(1.0, 10) == (pytest.approx(10 / (10 + Z_95**2)), 1.0)


@pytest.mark.parametrize(("share", "count"), [(0.5, 0), (-0.1, 5), (1.1, 5), (math.nan, 5)])
def test_what_has_no_interval_is_refused(share: float, count: int) -> None:
    with pytest.raises(RequestError, match="has no interval"):
        wilson_interval(share, count)


def test_the_bootstrap_of_a_mean_is_that_of_drawing_prompts_one_by_one() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    random = np.random.default_rng(2)
    means = [values[random.integers(0, 60, 60)].mean() for _ in range(20_000)]
    low, high = mean_interval(values)
    width = high - low
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.05 * width)
    assert low < values.mean() < high


@pytest.mark.parametrize("count", [1, 3, 5001])
def test_every_draw_is_of_as_many_prompts_as_there_are(count: int) -> None:
    drawn = list(draw_prompts(count, resamples=900))
    assert sum(map(len, drawn)) == 900
    assert all((counts.sum(axis=1) == count).all() for counts in drawn)
    assert count == 1 or np.unique(drawn[0], axis=0).shape[0] > 1


def test_differences_have_a_narrower_interval_than_what_they_are_differences_of() -> None:
    random = np.random.default_rng(3)
    hard = random.normal(size=200)
    a, b = hard + random.normal(scale=0.1, size=200), hard + random.normal(scale=0.1, size=200)
    own, paired = mean_interval(a), mean_interval(a - b)
    assert paired[1] - paired[0] < 0.3 * (own[1] - own[0])


def test_a_share_is_counted_where_prompts_say_yes_or_no_or_all_the_same_and_else_drawn() -> None:
    assert share_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(0.75, 4)
    assert share_interval([1.0] * 7) == wilson_interval(1.0, 7)
    assert share_interval([0.5] * 7) == wilson_interval(0.5, 7)
    shares = [0.25, 0.5, 1.0, 0.0, 0.75]
    assert share_interval(shares) == mean_interval(shares)
    with pytest.raises(RequestError, match="a share lies between 0 and 1"):
        share_interval([0.5, 1.5])


def test_an_interval_is_the_same_every_time_and_holds_the_mean_of_few_prompts() -> None:
    assert mean_interval([1.0, 5.0, 2.0]) == mean_interval([1.0, 5.0, 2.0])
    assert mean_interval([3.0]) == (3.0, 3.0)
