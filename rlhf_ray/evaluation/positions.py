"""How far two computations of the same log-probs are apart by the position in the answer.

A mean over all tokens hides an error that grows with length, such as of position ids, of a sliding window or of a cache: most
tokens stand early.

Invariants: every action is in exactly one part, that of its position among the actions of its answer. The means, weighed by
their counts, give the mean over all actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

PARTS = 8
GROWTH = 3.0
"""So many times larger the difference late in answers must be than in their beginning to be called growth."""
ERRORS = 4.0
"""And by so many standard errors."""
FEWEST = 30
"""Actions of a part that its standard error can be believed of."""


@dataclass(frozen=True)
class Part:
    """The actions of one range of positions: mean absolute difference in nats, its standard error, and how many they are."""

    mean: float
    error: float
    count: int


def by_position(
    difference: Float[Tensor, "N"], action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"], longest: int
) -> list[Part | None]:
    """Cut the positions from 0 to ``longest`` actions into eighths; None for one in which no answer has an action.

    ``difference`` is taken absolutely. Actions beyond ``longest`` are in the last part.
    """
    before = action_mask.cumsum(0) - action_mask.long()  # actions before each token, of all sequences
    starts = torch.cat([before, action_mask.sum()[None]])[offsets[:-1]]
    position = before - torch.repeat_interleave(starts, offsets.diff(), output_size=len(before))
    part = (position * PARTS // longest).clamp(max=PARTS - 1)[action_mask]
    apart = difference[action_mask].abs().double()
    found: list[Part | None] = []
    for number in range(PARTS):
        here = apart[part == number]
        error = float(here.std(unbiased=False)) / len(here) ** 0.5 if len(here) else 0.0
        found.append(Part(float(here.mean()), error, len(here)) if len(here) else None)
    return found


def growth(parts: list[Part | None], noise: float) -> tuple[Part, Part] | None:
    """Return the first part and the last, where the difference grows from one to the other beyond doubt; else None.

    Means up to ``noise`` nats are rounding, whatever their ratio. Parts of fewer than :data:`FEWEST` actions prove nothing.
    """
    seen = [part for part in parts if part is not None and part.count >= FEWEST]
    if len(seen) < 2:
        return None
    first, last = seen[0], seen[-1]
    doubt = ERRORS * (first.error**2 + last.error**2) ** 0.5
    grown = last.mean > noise and last.mean > GROWTH * first.mean and last.mean - first.mean > doubt
    return (first, last) if grown else None  # a mean that is no number has not grown
