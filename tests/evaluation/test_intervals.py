"""Wilson's interval against its defining equation: at its ends the share lies z standard errors away."""

from __future__ import annotations

import math

import pytest

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.intervals import Z_95, wilson_interval


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
