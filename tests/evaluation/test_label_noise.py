"""The estimate of label noise is the noise that made the labels, in closed form and in a simulation."""

from __future__ import annotations

import random

import pytest

from rlhf_ray.evaluation.label_noise import error_rate, estimate_label_noise


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.25, 0.4, 0.5])
def test_two_labels_differ_as_often_as_the_noise_says(noise: float) -> None:
    assert error_rate(2 * noise * (1 - noise)) == pytest.approx(noise, abs=1e-12)


def test_pairs_of_two_labels_give_the_closed_form() -> None:
    votes = [(2, 0)] * 50 + [(0, 2)] * 14 + [(1, 1)] * 36 + [(1, 0)] * 1000
    noise = estimate_label_noise(votes)
    assert noise is not None
    assert (noise.pairs, noise.disagreement) == (100, pytest.approx(0.36))
    assert noise.rate == pytest.approx((1 - 0.28**0.5) / 2)
    assert noise.interval[0] < noise.rate < noise.interval[1]


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_it_finds_the_noise_that_raters_had(labels: int) -> None:
    """The mean over 4000 pairs lies within four standard errors of the truth, however many labels a pair has."""
    coin, noise, votes = random.Random(labels), 0.15, []
    for _ in range(4000):
        wrong = sum(coin.random() < noise for _ in range(labels))
        votes.append((labels - wrong, wrong) if coin.random() < 0.5 else (wrong, labels - wrong))
    found = estimate_label_noise(votes)
    assert found is not None
    assert found.rate == pytest.approx(noise, abs=0.02)
    assert found.interval[0] < noise < found.interval[1]
    swapped = estimate_label_noise([(other, one) for one, other in votes])
    assert swapped == found


def test_labels_that_differ_half_of_the_time_or_more_say_nothing_and_single_labels_tell_nothing() -> None:
    contradicting = estimate_label_noise([(1, 1)] * 10)
    assert contradicting is not None
    assert (contradicting.rate, contradicting.interval[1]) == (0.5, 0.5)
    agreeing = estimate_label_noise([(3, 0)] * 10)
    assert agreeing is not None and agreeing.rate == 0.0
    assert estimate_label_noise([(1, 0), (0, 1)]) is None
