"""Running mean and deviation of the rewards of a whole run.

Always true: moments are never changed, ``update`` returns the next ones; they are those of all finite numbers seen so far,
however these came in batches (Chan et al. 1979); ``state`` is all that a checkpoint must hold.
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
    """Of the numbers seen so far: how many, their mean, and the sum of squared distances from it."""

    count: float = 0.0
    mean: float = 0.0
    scatter: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation (divided by n); 1 while nothing has varied, so that dividing by it changes nothing."""
        return math.sqrt(self.scatter / self.count) if self.scatter > 0 else 1.0

    def update(self, numbers: Float[Tensor, "B"]) -> RunningMoments:
        """The moments after ``numbers`` too; NaN and Inf teach nothing."""
        finite = numbers[torch.isfinite(numbers)].double()
        count = len(finite)
        if count == 0:
            return self
        mean = float(finite.mean())
        total, shift = self.count + count, mean - self.mean
        scatter = float((finite - mean).square().sum()) + shift**2 * self.count * count / total
        return RunningMoments(total, self.mean + shift * count / total, self.scatter + scatter)

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Mapping[str, float]) -> RunningMoments:
        """The moments of which ``state`` was taken."""
        return cls(**state)
