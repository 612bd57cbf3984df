"""pass@k and best-of-n equal the enumeration of every subset."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import NumericalError, RequestError
from rlhf_ray.evaluation import best_of_n, best_of_n_kl, mean_pass_at_k, pass_at_k, top_k_of_n_kl


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 9), share=st.floats(0, 1), k=st.integers(1, 9))
def test_pass_at_k_counts_subsets(samples, share, k) -> None:
    correct, k = round(share * samples), min(k, samples)
    outcomes = [index < correct for index in range(samples)]
    expected = fmean(any(subset) for subset in combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)


def test_pass_at_k_is_exact_where_floats_would_overflow() -> None:
    assert pass_at_k(20_000, 1, 10_000) == 0.5
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(10, 10, 5) == 1.0


def brute_force(rewards: list[int], gold: list[float], n: int) -> float:
    """The mean over all subsets of the gold of the sample with the best reward; ties by an even draw."""
    values = []
    for subset in combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        values.append(fmean(gold[i] for i in subset if rewards[i] == best))
    return fmean(values)


SAMPLES = st.lists(st.tuples(st.integers(-3, 3), st.floats(-1, 1)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40)
@given(prompts=st.lists(SAMPLES, min_size=1, max_size=3), n=st.integers(1, 8))
def test_best_of_n_counts_subsets(prompts, n) -> None:
    n = min(n, *(len(samples) for samples in prompts))
    rewards = [[reward for reward, _ in samples] for samples in prompts]
    gold = [[truth for _, truth in samples] for samples in prompts]
    expected = fmean(brute_force(r, g, n) for r, g in zip(rewards, gold, strict=True))
    assert best_of_n(rewards, gold, n) == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_best_of_n() -> None:
    rewards, gold = [[0.1, 0.9, 0.5]], [[1.0, 2.0, 6.0]]
    assert best_of_n(rewards, gold, 1) == pytest.approx(3.0)  # any sample
    assert best_of_n(rewards, gold, 3) == 2.0  # the reward's favourite, whatever gold says of it
    assert best_of_n([[1.0] * 500], [[0.25] * 500], 200) == pytest.approx(0.25)


def test_best_of_n_kl() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_best_of_n_kl_is_that_of_a_uniform_variable() -> None:
    """The best of n has the density n u^(n-1) over ranks u: its KL to the uniform one, by the midpoint rule."""
    n, grid = 5, 20_000
    density = [n * ((i + 0.5) / grid) ** (n - 1) for i in range(grid)]
    assert best_of_n_kl(n) == pytest.approx(fmean(d * math.log(d) for d in density), abs=1e-6)


def test_requests_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RequestError, match="k is 3, but there are 2 samples"):
        pass_at_k(2, 1, 3)
    with pytest.raises(RequestError, match="3 of 2 samples cannot be correct"):
        pass_at_k(2, 3, 1)
    with pytest.raises(RequestError, match="n is 3, but there are 2 samples"):
        best_of_n([[1.0, 2.0]], [[1.0, 2.0]], 3)
    with pytest.raises(RequestError, match="prompt 0 has 2 rewards, but 1 gold"):
        best_of_n([[1.0, 2.0]], [[1.0]], 1)
    with pytest.raises(RequestError, match="rewards has 0 prompts"):
        best_of_n([], [], 1)
    with pytest.raises(NumericalError, match=r"rewards\[1\]\[0\] is nan"):
        best_of_n([[1.0], [math.nan]], [[1.0], [1.0]], 1)
    with pytest.raises(RequestError, match="n starts at 1"):
        best_of_n_kl(0)


def test_pass_at_k_of_several_prompts_is_the_mean_whatever_they_were_sampled() -> None:
    right = [[True, False, False, False], [False, False], [True, True]]
    assert mean_pass_at_k(right, 1) == pytest.approx((0.25 + 0.0 + 1.0) / 3)
    assert mean_pass_at_k(right, 2) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    with pytest.raises(RequestError, match="pass@k of no prompts"):
        mean_pass_at_k([], 1)
    with pytest.raises(RequestError, match="k is 3, but there are 2 samples"):
        mean_pass_at_k(right, 3)


def test_the_kl_of_the_best_k_is_that_of_the_best_one_and_of_no_choice_at_its_ends() -> None:
    for n in (1, 2, 3, 16, 100, 1000):
        assert top_k_of_n_kl(1, n) == pytest.approx(best_of_n_kl(n), abs=1e-9)
        assert top_k_of_n_kl(n, n) == pytest.approx(0.0, abs=1e-9)
    # 2 of 3: the density at the quantile u is 3 / 2 (1 - (1 - u)^2), whose entropy is summed here in small steps.
    steps = 200_000
    density = [1.5 * (1 - (1 - (step + 0.5) / steps) ** 2) for step in range(steps)]
    assert top_k_of_n_kl(2, 3) == pytest.approx(sum(p * math.log(p) for p in density) / steps, abs=1e-6)
    with pytest.raises(RequestError, match="k is 5, but there are 4 samples"):
        top_k_of_n_kl(5, 4)
