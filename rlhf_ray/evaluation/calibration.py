"""Measure whether a reward model is as often right as its margins claim: P(chosen wins) = sigmoid(margin).

Invariants:

- The confidence of a pair is that of the side with the higher score, max(p, 1 - p), so that the order of the sides does not
  matter.
- Every pair falls into exactly one bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlhf_ray.evaluation.preferences import margins


@dataclass(frozen=True)
class CalibrationBin:
    """The pairs of one range of confidence: mean confidence, share that is right, number of pairs."""

    confidence: float
    accuracy: float
    count: int


def calibration_bins(chosen: ArrayLike, rejected: ArrayLike, bins: int = 10) -> list[CalibrationBin]:
    """Sort the pairs into bins of equal width over confidences from 0.5 to 1; bins without pairs are left out."""
    margin = margins(chosen, rejected, ("chosen", "rejected"))
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margin)))
    right = (margin > 0) + 0.5 * (margin == 0)
    # confidences lie between 0.5 and 1: times 2, their distance from 0.5 covers 0 to 1
    row = np.minimum(((confidence - 0.5) * 2.0 * bins).astype(np.int64), bins - 1)
    members = [row == index for index in range(bins)]
    return [
        CalibrationBin(float(confidence[member].mean()), float(right[member].mean()), int(member.sum()))
        for member in members
        if member.any()
    ]


def calibration_error(chosen: ArrayLike, rejected: ArrayLike, bins: int = 10) -> float:
    """Return the expected calibration error: the mean over pairs of ``|accuracy - confidence|`` of their bin."""
    filled = calibration_bins(chosen, rejected, bins)
    total = sum(one.count for one in filled)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in filled) / total
