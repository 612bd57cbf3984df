"""How far two computations of the same numbers are apart, and how much of that rounding explains.

Invariant: the noise that is published for sound models passes, single tokens far off included. A difference that most tokens
have, or one token in a hundred, does not pass.

What sound models in bf16 do, in nats a token: Qwen2.5-0.5B over 3,916 tokens has a standard deviation of 0.050 between vLLM and
trainer (95th percentile 0.113, largest 0.477), and 0.055 (0.117, 0.656) between two batches of the trainer alone (TRL issue
6789). Qwen2.5 of 0.5B and 7B has a root mean square of 0.022 to 0.041 between vLLM and two trainers, and 0.002 in fp32 on a GPU
(Fast-LLM pull request 525). In the mixture Qwen3.5-35B-A3B, where a router may send a token to another expert, the mean is
0.016 and the largest of a step's tokens is 5.1 on average (IsoExec). So the largest says little, and the mean much.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """What absolute differences of rounding keep to: their mean, two percentiles and the largest of them."""

    mean: float
    p99: float
    p999: float
    largest: float

    @classmethod
    def of_all(cls, largest: float) -> Bounds:
        """No difference is larger than this."""
        return cls(largest, largest, largest, largest)

    def __str__(self) -> str:
        if self.mean == self.largest:
            return f"<= {self.largest:g}"
        return f"mean <= {self.mean:g}, 99 % {self.p99:g}, 99.9 % {self.p999:g}, largest {self.largest:g}"

    def times(self, size: float) -> Bounds:
        """The bounds of numbers of this size, of bounds relative to it."""
        return Bounds(self.mean * size, self.p99 * size, self.p999 * size, self.largest * size)


LOG_PROB_BOUNDS = {
    "fp32": Bounds.of_all(1e-4),
    "fp16": Bounds(0.01, 0.06, 0.3, 2.0),
    "bf16": Bounds(0.06, 0.35, 2.0, 10.0),
}
"""By dtype, in nats: bf16 of twice the published noise, fp16 an eighth of it, since it has three more bits; fp32 on CPU, as we
measured it."""
SCORE_BOUNDS = {
    "fp32": Bounds.of_all(1e-4),
    "fp16": Bounds(0.005, 0.05, 0.05, 0.05),
    "bf16": Bounds(0.02, 0.2, 0.2, 0.2),
}
"""By dtype, of scores of one model in two batches, relative to their size."""


class Spread:
    """How far the two numbers of many pairs are apart."""

    def __init__(self, differences: Float[Tensor, "pairs"]) -> None:
        """``differences`` of at least one pair, of either sign; one that is NaN is within no bounds."""
        self._sorted = differences.double().abs().sort().values
        self.count = len(self._sorted)
        self.mean = float(self._sorted.mean())
        self.p99 = float(self._sorted[int(0.99 * (self.count - 1))])
        self.largest = float(self._sorted[-1])

    def within(self, bounds: Bounds) -> bool:
        """Whether rounding explains the differences. Of few pairs the mean and the shares are less sure, so that they may be
        larger."""
        of_few = 1.0 + 4.0 / self.count**0.5 if bounds.mean < bounds.largest else 1.0
        return (
            self.mean <= bounds.mean * of_few
            and self.largest <= bounds.largest
            and self._few_beyond(bounds.p99, 0.01)
            and self._few_beyond(bounds.p999, 0.001)
        )

    def _few_beyond(self, bound: float, share: float) -> bool:
        expected = share * self.count
        beyond = int((self._sorted > bound).sum())
        return bool(beyond <= expected + 2.0 * expected**0.5 + 1.0)

    def __str__(self) -> str:
        return f"mean {self.mean:.1e}, 99 % {self.p99:.1e}, largest {self.largest:.1e}"


def loosest(bounds: Iterable[Bounds]) -> Bounds:
    """The bounds of a comparison that each of several dtypes has a part in."""
    return max(bounds, key=lambda each: each.mean)
