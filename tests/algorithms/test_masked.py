"""Masked tokens have no influence; whitening has the closed forms it names."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.masked import keep, masked_mean, masked_sum, segment_sum, sequence_of_token, whiten

NUMBERS = st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=30)
POISONS = [math.nan, math.inf, -math.inf, 1e30]


def split(rows: list[tuple[float, bool]], poison: float = 7.0) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """The tensor with ``poison`` outside the mask, the mask, and the numbers inside."""
    x = torch.tensor([number if kept else poison for number, kept in rows])
    return x, torch.tensor([kept for _, kept in rows]), [number for number, kept in rows if kept]


@settings(deadline=None, max_examples=40)
@given(rows=NUMBERS, poison=st.sampled_from(POISONS))
def test_sum_and_mean_are_those_of_the_tokens_that_count(rows, poison) -> None:
    x, mask, inside = split(rows, poison)
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(inside), abs=1e-3)
    assert masked_mean(x, mask).item() == pytest.approx(statistics.fmean(inside) if inside else 0.0, abs=1e-4)


@pytest.mark.parametrize("poison", POISONS)
def test_no_gradient_reaches_a_masked_token(poison) -> None:
    x = torch.tensor([1.0, poison, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    (gradient,) = torch.autograd.grad(keep(x, mask).exp().sum(), x)
    assert gradient.tolist() == pytest.approx([math.e, 0.0, math.e**3])


def test_nan_at_a_token_that_counts_stays() -> None:
    x, mask = torch.tensor([1.0, math.nan]), torch.tensor([True, True])
    assert masked_sum(x, mask).isnan()
    assert whiten(x, mask).isnan().all()


@settings(deadline=None, max_examples=40)
@given(rows=NUMBERS, poison=st.sampled_from(POISONS), unbiased=st.booleans(), shift_mean=st.booleans())
def test_whitening_is_the_closed_form(rows, poison, unbiased, shift_mean) -> None:
    x, mask, inside = split(rows, poison)
    whitened = whiten(x, mask, unbiased=unbiased, shift_mean=shift_mean)
    assert (whitened[~mask] == 0).all()
    assert whitened.dtype == torch.float32
    if not inside:
        return
    mean = statistics.fmean(inside)
    variance = 0.0 if len(inside) == 1 else (statistics.variance if unbiased else statistics.pvariance)(inside)
    shift = 0.0 if shift_mean else mean
    expected = [(number - mean) / math.sqrt(variance + 1e-8) + shift for number in inside]
    assert whitened[mask].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_whitened_numbers_have_mean_zero_and_deviation_one_far_from_zero() -> None:
    """One pass in float32 would lose the variance of numbers near 10,000."""
    x = 10_000 + torch.randn(5000, generator=torch.Generator().manual_seed(0))
    whitened = whiten(x, torch.ones(5000, dtype=torch.bool))
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert whitened.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 6), max_size=8), seed=st.integers(0, 1000))
def test_segment_sum_is_the_sum_of_each_sequence(lengths, seed) -> None:
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    offsets = torch.tensor([sum(lengths[:row]) for row in range(len(lengths) + 1)])
    expected = [part.sum().item() for part in values.split(lengths)] if lengths else []
    assert segment_sum(values, offsets).tolist() == pytest.approx(expected)
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    assert sequence_of_token(offsets).tolist() == sequence_of_token(offsets, sum(lengths)).tolist() == rows


def test_nan_stays_in_its_own_sequence() -> None:
    sums = segment_sum(torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.tensor([0, 1, 2, 4]))
    assert sums[[0, 2]].tolist() == [1.0, 5.0]
    assert sums[1].isnan()


@pytest.mark.usefixtures("outside_pytest")
def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \(1,\), but \(3,\) is needed"):
        masked_sum(torch.zeros(3), torch.ones(1, dtype=torch.bool))
