"""How far a figure that was counted or averaged can lie from the true one.

Invariants: an interval holds the figure itself, and that of a share lies within [0, 1], also where it is 0 or 1. What is drawn
again is always a whole prompt, with all that was measured on it, since its answers are alike; the same values have the same
interval every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.preferences import finite_scores

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for intervals of 95 %."""
ENDS = (0.025, 0.975)
"""The quantiles at which an interval of 95 % ends."""
RESAMPLES = 4000
"""How often the prompts are drawn again: the ends of an interval move by about 2 % of its width from one seed to another."""
CELLS_AT_ONCE = 2_000_000
"""Counts of drawn prompts that are in memory together."""

Interval = tuple[float, float]


def wilson_interval(share: float, count: int, z: float = Z_95) -> Interval:
    """Return Wilson's score interval (1927) for a share of ``count`` independent trials; by default of 95 %."""
    if count < 1 or not 0.0 <= share <= 1.0:
        raise RequestError(f"a share of {share} of {count} trials has no interval: give 0 to 1 of one or more")
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def mean_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval (Efron 1979) of 95 % for the mean of one value a prompt.

    Of two models on the same prompts give the differences: what makes a prompt hard for both then cancels out.
    """
    each = finite_scores(values, "values")
    means = np.concatenate([counts @ each for counts in draw_prompts(len(each), seed=seed)]) / len(each)
    return ends_around(means, float(each.mean()))


def share_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """Return an interval of 95 % for the mean of one share a prompt, each within [0, 1].

    Wilson's where every prompt says yes or no, or all say the same, of which drawing again shows nothing; or else the
    bootstrap's.
    """
    each = finite_scores(values, "values")
    if not ((each >= 0.0) & (each <= 1.0)).all():
        raise RequestError("a share lies between 0 and 1: give one of each prompt")
    if np.isin(each, (0.0, 1.0)).all() or (each == each[0]).all():
        return wilson_interval(float(each.mean()), len(each))
    return mean_interval(each, seed)


def draw_prompts(prompts: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Yield how often each prompt is drawn, as many with replacement as there are: some rows of (resamples, prompts) a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, CELLS_AT_ONCE // prompts)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        yield random.multinomial(prompts, np.full(prompts, 1 / prompts), size=size).astype(np.float64)


def ends_around(figures: NDArray[np.float64], figure: float) -> Interval:
    """Return the ends of the middle 95 % of ``figures`` of drawn prompts, widened to that of all where it lies outside."""
    low, high = np.quantile(figures, ENDS)
    return min(float(low), figure), max(float(high), figure)
