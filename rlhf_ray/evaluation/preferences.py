"""How often one score beats another.

Always true: a tie counts one half, so that swapping the sides turns a rate p into 1 - p and a model that gives one
score to everything has 0.5; a score that is not finite is refused by its position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.errors import NumericalError, RequestError


def accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """The share of pairs whose chosen side has the higher score."""
    return _half_counted(margins(chosen, rejected, ("chosen", "rejected")))


def win_rate(a: ArrayLike, b: ArrayLike) -> float:
    """The share of prompts at which ``a`` scores above ``b``."""
    return _half_counted(margins(a, b, ("a", "b")))


def tie_rate(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """The share of pairs whose sides have equal scores: above 0 it says that a head's precision is too low."""
    return float(np.mean(margins(chosen, rejected, ("chosen", "rejected")) == 0))


def margins(chosen: ArrayLike, rejected: ArrayLike, names: tuple[str, str]) -> NDArray[np.float64]:
    """``chosen - rejected``, pair by pair, after the checks that every figure needs."""
    left, right = finite_scores(chosen, names[0]), finite_scores(rejected, names[1])
    if left.shape != right.shape:
        raise RequestError(f"{names[0]} has {len(left)} scores, but {names[1]} has {len(right)}: give one pair by pair")
    return left - right


def finite_scores(scores: ArrayLike, name: str) -> NDArray[np.float64]:
    """Scores as float64, at least one, all finite."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise RequestError(f"{name} has shape {array.shape}: give a list of at least one score")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise NumericalError(f"{name}[{wrong[0]}] is {array[wrong[0]]}: only finite scores can be compared")
    return array


def _half_counted(margin: NDArray[np.float64]) -> float:
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))
