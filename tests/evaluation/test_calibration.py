"""Calibration by hand, and of a model that is right by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.evaluation import CalibrationBin, calibration_bins, calibration_error


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_by_hand() -> None:
    """Four pairs at confidence 0.72 of which three are right; two ties; one sure mistake; one sure hit."""
    margins = [logit(0.72)] * 3 + [-logit(0.72)] + [0.0, 0.0] + [-50.0, 50.0]
    filled = calibration_bins(margins, [0.0] * 8, bins=10)
    assert [(one.confidence, one.accuracy, one.count) for one in filled] == [
        (pytest.approx(0.5), 0.5, 2),
        (pytest.approx(0.72), 0.75, 4),
        (pytest.approx(1.0), 0.5, 2),
    ]
    assert calibration_error(margins, [0.0] * 8) == pytest.approx((2 * 0.0 + 4 * 0.03 + 2 * 0.5) / 8)


def test_a_model_that_draws_its_labels_from_its_own_margins_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 200_000)
    chosen_first = rng.random(200_000) < 1 / (1 + np.exp(-margins))
    signed = np.where(chosen_first, margins, -margins)  # the margin of the side that was chosen
    assert calibration_error(signed, np.zeros_like(signed)) < 0.005
    assert calibration_error(3 * signed, np.zeros_like(signed)) > 0.05  # over-confident


@settings(deadline=None, max_examples=40)
@given(
    margins=st.lists(st.floats(-800, 800), min_size=1, max_size=30),
    bins=st.integers(1, 20),
    shift=st.integers(-50, 50),
)
def test_every_pair_is_in_one_bin_and_the_error_is_a_share(margins, bins, shift) -> None:
    filled = calibration_bins(margins, [0.0] * len(margins), bins)
    assert sum(one.count for one in filled) == len(margins)
    assert 0 <= calibration_error(margins, [0.0] * len(margins), bins) <= 1
    for one in filled:
        assert isinstance(one, CalibrationBin)
        assert 0.5 <= one.confidence <= 1


def test_far_margins_neither_overflow_nor_leave_the_last_bin() -> None:
    with np.errstate(all="raise"):
        (only,) = calibration_bins([600.0, -600.0], [0.0, 0.0])
    assert (only.confidence, only.accuracy, only.count) == (1.0, 0.5, 2)


def test_bins_are_of_equal_width_from_one_half_to_one() -> None:
    inside = [0.51, 0.54, 0.56, 0.59, 0.61, 0.94, 0.96]
    filled = calibration_bins([logit(p) for p in inside], [0.0] * len(inside), bins=10)
    assert [one.count for one in filled] == [2, 2, 1, 1, 1]
    assert len(calibration_bins([logit(p) for p in inside], [0.0] * len(inside), bins=1)) == 1
