"""Which answers to one prompt are compared with each other, and what scores follow from the comparisons.

Invariants: no answer is compared with itself, and every answer is in a comparison; asked in both orders, each of a pair is
shown first as often as the other, else each answer is shown first in half of its comparisons, give or take one. Scores depend
on the verdicts alone: answers in another order have the same scores in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

Compare = Literal["pairs", "circle", "all"]
"""``pairs``: the first with the second, the third with the fourth. ``circle``: each with the next, the last with the first.
``all``: each with every other. Answers are samples of one policy, so that their order is a drawn one."""
Ranking = Literal["win_share", "bradley_terry"]
STEPS = 100
"""Newton's method has ended long before, in tests after fewer than ten."""


@dataclass(frozen=True)
class Comparison:
    """One verdict: which answers were shown, and the share of the win that the first has (1, 0, or a half for a tie)."""

    first: int
    second: int
    share: float


def comparisons(count: int, compare: Compare, *, both_orders: bool) -> list[tuple[int, int]]:
    """The positions of the answers of each comparison, the one that is shown first before the other.

    Raises ``ValueError`` for fewer than two answers, and for pairs of an odd number.
    """
    if count < 2 or (compare == "pairs" and count % 2):
        raise ValueError(f"{count} answers cannot be compared by {compare}")
    if compare == "pairs":
        edges = [(one, one + 1) for one in range(0, count, 2)]
    elif compare == "circle":
        edges = [(one, (one + 1) % count) for one in range(count)][: None if count > 2 else 1]
    else:
        edges = [(one, two) if (two - one) % 2 else (two, one) for one, two in combinations(range(count), 2)]
    return [*edges, *((second, first) for first, second in edges)] if both_orders else edges


def scores(count: int, verdicts: Sequence[Comparison], ranking: Ranking) -> list[float]:
    """One score for each of ``count`` answers, each of which is in a verdict."""
    won, met = _table(count, verdicts)
    ranked = won.sum(1) / met.sum(1) if ranking == "win_share" else _strengths(won, met)
    return [float(score) for score in ranked]


def _table(count: int, verdicts: Sequence[Comparison]) -> tuple[np.ndarray, np.ndarray]:
    """How often each answer has won over each other, and how often they met."""
    won = np.zeros((count, count))
    for one in verdicts:
        won[one.first, one.second] += one.share
        won[one.second, one.first] += 1.0 - one.share
    return won, won + won.T


def _strengths(won: np.ndarray, met: np.ndarray) -> np.ndarray:
    """The most likely strengths of Bradley and Terry (1952), in nats, with mean 0.

    One answer wins over another with probability ``sigmoid(strength - strength of the other)``. Every pair that met has tied
    once more than it did: without that an answer that always wins would have an infinite strength. The likelihood is then
    strictly concave but for a constant, and Newton's steps, halved where they lead down, find its maximum.
    """
    met_at_all = met > 0
    wins, meetings = won + 0.5 * met_at_all, met + met_at_all
    count = len(won)
    strengths = np.zeros(count)

    def likelihood(at: np.ndarray) -> float:
        return float(-(wins * np.logaddexp(0.0, at[None, :] - at[:, None])).sum())

    for _ in range(STEPS):
        chance = 1.0 / (1.0 + np.exp(strengths[None, :] - strengths[:, None]))
        gradient = (wins - meetings * chance).sum(1)
        weights = meetings * chance * (1.0 - chance)
        curvature = np.diag(weights.sum(1)) - weights + 1.0 / count  # the constant direction is free: keep the mean
        step = np.linalg.solve(curvature, gradient)
        while likelihood(strengths + step) < likelihood(strengths) and np.abs(step).max() > 1e-12:
            step = step / 2
        strengths = strengths + step
        if np.abs(step).max() < 1e-10:
            break
    return np.asarray(strengths - strengths.mean())
