"""The running mean and standard deviation of the rewards of a run.

Invariants:

- Moments never change: ``update`` returns the next ones, and ``state`` is all that a checkpoint must hold.
- They are those of all finite numbers seen so far, however these were split into batches (Chan et al. 1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """The count of the numbers seen so far, their mean, and the sum of their squared distances from it (``scatter``)."""

    count: float = 0.0
    mean: float = 0.0
    scatter: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation, with the variance over n; 1 while nothing has varied, so that dividing by it is harmless."""
        return math.sqrt(self.scatter / self.count) if self.scatter > 0 else 1.0

    def update(self, numbers: Float[Tensor, "B"]) -> RunningMoments:
        """Return the moments after these numbers as well; NaN and Inf are skipped."""
        finite = numbers[torch.isfinite(numbers)].double()
        count = len(finite)
        if count == 0:
            return self
        mean = float(finite.mean())
        total, shift = self.count + count, mean - self.mean
        scatter = float((finite - mean).square().sum()) + shift**2 * self.count * count / total
        return RunningMoments(total, self.mean + shift * count / total, self.scatter + scatter)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Mapping[str, float]) -> RunningMoments:
        """Return the moments that ``state`` was taken of."""
        return cls(**state)
