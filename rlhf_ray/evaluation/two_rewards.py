"""What two rewards of the same answers have in common: how alike they rank them, and how many pairs they order differently.

Invariant: a pair that either reward takes for equal is in no order, and counts neither as kept nor as flipped; a figure of
nothing is none.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.preferences import finite_scores


class Order(NamedTuple):
    """How the pairs of some answers are ordered by two rewards."""

    ordered: int
    """Pairs that neither reward takes for equal."""
    flipped: int
    """Those of them that the rewards order differently."""


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float | None:
    """Spearman's rank correlation, equal values at their mean rank; none of fewer than two values, or of values all equal."""
    first, second = _both(one, other)
    ranks = _ranks(first), _ranks(second)
    if len(first) < 2 or any(np.ptp(each) == 0 for each in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def pair_order(one: ArrayLike, other: ArrayLike) -> Order:
    """The order of all pairs of answers, each of which has one value of either reward."""
    first, second = _both(one, other)
    signs = [
        np.sign(first[a] - first[b]) * np.sign(second[a] - second[b]) for a, b in combinations(range(len(first)), 2)
    ]
    return Order(sum(bool(sign) for sign in signs), sum(bool(sign < 0) for sign in signs))


def _both(one: ArrayLike, other: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = finite_scores(one, "one"), finite_scores(other, "other")
    if first.shape != second.shape:
        raise RequestError(
            f"there are {len(first)} values of one reward and {len(second)} of the other: give both of each"
        )
    return first, second


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: np.ndarray = (ends - counts + ends + 1) / 2
    return means[place]
