"""Count how often one score beats another.

Invariants:

- A tie counts one half: swapping the sides turns a rate p into 1 - p, and a model that scores everything alike has 0.5.
- A score that is not finite is refused, and the error gives its position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.errors import NumericalError, RequestError


def accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Return the share of pairs whose chosen side has the higher score."""
    return _share_of_wins(margins(chosen, rejected, ("chosen", "rejected")))


def win_rate(a: ArrayLike, b: ArrayLike) -> float:
    """Return the share of prompts at which ``a`` scores above ``b``."""
    return _share_of_wins(margins(a, b, ("a", "b")))


def ranking_accuracy(better: ArrayLike, worse: ArrayLike) -> float:
    """Return the share of all pairs of one of ``better`` and one of ``worse`` in which the better one has the higher score.

    The two may have different lengths; it is the area under the curve of true over false positives.
    """
    high, low = finite_scores(better, "better"), np.sort(finite_scores(worse, "worse"))
    below = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return float(below.sum() / (2 * len(high) * len(low)))


def tie_rate(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Return the share of pairs whose sides have equal scores; above 0 it hints that the precision of a head is too low."""
    return float(np.mean(margins(chosen, rejected, ("chosen", "rejected")) == 0))


def margins(chosen: ArrayLike, rejected: ArrayLike, names: tuple[str, str]) -> NDArray[np.float64]:
    """Return ``chosen - rejected`` for each pair. Raises ``RequestError`` or ``NumericalError`` for scores of no use."""
    left, right = finite_scores(chosen, names[0]), finite_scores(rejected, names[1])
    if left.shape != right.shape:
        raise RequestError(
            f"{names[0]} has {len(left)} scores, but {names[1]} has {len(right)}: give one of each per pair"
        )
    return left - right


def finite_scores(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return scores as float64; raises for an empty list and for scores that are not finite."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise RequestError(f"{name} has shape {array.shape}: give a list of one score or more")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise NumericalError(f"{name}[{wrong[0]}] is {array[wrong[0]]}: only finite scores can be compared")
    return array


def _share_of_wins(margin: NDArray[np.float64]) -> float:
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))
