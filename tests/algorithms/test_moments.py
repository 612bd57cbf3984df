"""Running moments are those of all numbers so far, however they came."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.moments import RunningMoments

BATCHES = st.lists(st.lists(st.floats(-100, 100, width=32), max_size=5), max_size=6)


def seen(batches: list[list[float]]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments = moments.update(torch.tensor(batch))
    return moments


@settings(deadline=None, max_examples=60)
@given(batches=BATCHES)
def test_batches_add_up_to_the_whole(batches) -> None:
    moments = seen(batches)
    every = torch.tensor([number for batch in batches for number in batch], dtype=torch.float64)
    assert moments.count == len(every)
    if len(every):
        assert moments.mean == pytest.approx(every.mean().item(), abs=1e-9)
        assert moments.scatter == pytest.approx((every - every.mean()).square().sum().item(), abs=1e-6, rel=1e-9)


def test_what_has_not_varied_deviates_by_one() -> None:
    assert seen([]).deviation == seen([[3.0, 3.0]]).deviation == 1.0
    assert seen([[1.0], [3.0]]).deviation == 1.0
    assert seen([[0.0, 4.0]]).deviation == 2.0


def test_what_is_not_finite_teaches_nothing() -> None:
    assert seen([[1.0, math.nan, 3.0], [math.inf]]) == seen([[1.0, 3.0]])


@settings(deadline=None, max_examples=20)
@given(batches=BATCHES)
def test_a_checkpoint_gives_back_the_same_moments_bit_for_bit(batches) -> None:
    moments = seen(batches)
    assert RunningMoments.restored(json.loads(json.dumps(moments.state()))) == moments
