"""In which order rows are used: shuffled anew each epoch, and resumable at any row.

Always true: each epoch holds each row exactly once; the stream depends on the seed and the size alone, so that a stream
continued from its state is the one that was interrupted, however its rows were taken before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from rlhf_ray.errors import RequestError


class ShuffledOrder:
    """An endless stream of row numbers, one permutation after the other."""

    def __init__(self, seed: int, size: int, taken: int = 0) -> None:
        if size < 1:
            raise RequestError(f"an order needs at least one row, this data set has {size}")
        if taken < 0:
            raise RequestError(f"an order cannot have given out {taken} rows")
        self.seed, self.size, self.taken = seed, size, taken
        self._permutation: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self.taken // self.size

    def take(self, count: int) -> list[int]:
        """The next ``count`` row numbers, over the end of an epoch if need be."""
        rows: list[int] = []
        while len(rows) < count:
            start = self.taken % self.size
            chosen = self._epoch(self.epoch)[start : start + count - len(rows)]
            rows += chosen
            self.taken += len(chosen)
        return rows

    def state(self) -> dict[str, int]:
        """All that is needed to continue, as plain numbers."""
        return {"seed": self.seed, "size": self.size, "taken": self.taken}

    @classmethod
    def from_state(cls, state: Mapping[str, int], size: int | None = None) -> ShuffledOrder:
        """Continue an interrupted stream; ``size`` is the number of rows that there are now."""
        if size is not None and size != state["size"]:
            raise RequestError(
                f"the data set has {size} rows, but had {state['size']} when this order was saved: "
                "resume with the same data, or start a new run"
            )
        return cls(state["seed"], state["size"], state["taken"])

    def _epoch(self, number: int) -> list[int]:
        if self._permutation is None or self._permutation[0] != number:
            rows = list(range(self.size))
            random.Random(f"order/{self.seed}/{number}").shuffle(rows)
            self._permutation = (number, rows)
        return self._permutation[1]
