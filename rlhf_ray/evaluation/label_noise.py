"""How often the labels of pairs are wrong, as far as pairs that were labelled more than once tell.

The model: each pair has a better side, and each of its labels is wrong with the same probability e, independently of the
others. Two labels of a pair then differ with probability ``D = 2 e (1 - e)``, so ``e = (1 - sqrt(1 - 2 D)) / 2``. Raters who
make the same mistakes, and rows that are copies of each other, make the estimate too low; pairs on which opinions differ are
counted as noise.

Invariants: swapping all labels changes nothing; labels that never differ give 0, labels that differ half of the time or
more give 0.5, which means that they say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_ray.evaluation.intervals import wilson_interval


@dataclass(frozen=True)
class LabelNoise:
    """The estimate with its interval of 95 %, and what it rests on."""

    rate: float
    """The probability that a label is wrong."""
    interval: tuple[float, float]
    disagreement: float
    """How often two labels of one pair differ, averaged over the pairs that have several."""
    pairs: int
    """Pairs that were labelled more than once."""


def estimate_label_noise(votes: Iterable[tuple[int, int]]) -> LabelNoise | None:
    """Estimate the noise from the number of labels for either side of each pair; None where no pair has two labels.

    The interval takes each pair as one trial, which is exact where pairs have two labels, and wider than needed where they
    have more.
    """
    shares = [2 * one * other / ((one + other) * (one + other - 1)) for one, other in votes if one + other > 1]
    if not shares:
        return None
    disagreement = math.fsum(shares) / len(shares)
    low, high = wilson_interval(min(disagreement, 1.0), len(shares))
    return LabelNoise(error_rate(disagreement), (error_rate(low), error_rate(high)), disagreement, len(shares))


def error_rate(disagreement: float) -> float:
    """Return the probability of a wrong label at which two labels differ this often."""
    return (1.0 - math.sqrt(max(1.0 - 2.0 * disagreement, 0.0))) / 2.0
