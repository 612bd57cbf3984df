"""The order in which rows are used: shuffled anew each epoch, mixed from several files, and resumable at any row.

Invariants: an epoch takes from each part exactly as many rows as its weight says, and after any number of epochs the rows
of a part have come equally often, to within one; so with weight 1 each epoch holds each row exactly once. The stream depends
on the seed and the parts alone, so a stream that continues from its state goes on as if it had never been interrupted, in
whatever portions its rows were taken.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ray.errors import RequestError


class Part(NamedTuple):
    """The rows of one file, which follow each other in the numbers of all rows."""

    size: int
    """How many rows there are."""
    per_epoch: int
    """How many of them an epoch takes."""

    @classmethod
    def weighted(cls, size: int, weight: float) -> Part:
        """A part of which an epoch takes ``weight`` times its size, and one row at least."""
        return cls(size, max(round(weight * size), 1) if size else 0)


class ShuffledOrder:
    """An endless stream of row numbers, one epoch after the other."""

    def __init__(self, seed: int, rows: int | Sequence[Part], taken: int = 0) -> None:
        """``rows`` are the parts in their order, or the size of the only one; ``taken`` rows were taken before."""
        self.parts = [Part(rows, rows)] if isinstance(rows, int) else [Part(*part) for part in rows]
        self.epoch_size = sum(part.per_epoch for part in self.parts)
        if self.epoch_size < 1:
            raise RequestError(
                f"an order needs at least one row, this data set has {sum(size for size, _ in self.parts)}"
            )
        if taken < 0:
            raise RequestError(f"an order cannot have given out {taken} rows")
        self.seed, self.taken = seed, taken
        self._permutation: tuple[int, list[int]] | None = None

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return self.taken // self.epoch_size

    def take(self, count: int) -> list[int]:
        """The next ``count`` row numbers, across the end of an epoch if need be."""
        rows: list[int] = []
        while len(rows) < count:
            start = self.taken % self.epoch_size
            chosen = self._epoch(self.epoch)[start : start + count - len(rows)]
            rows += chosen
            self.taken += len(chosen)
        return rows

    def state(self) -> dict[str, Any]:
        """What :meth:`from_state` needs to continue the stream, as plain numbers."""
        return {"seed": self.seed, "parts": [list(part) for part in self.parts], "taken": self.taken}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], rows: int | Sequence[Part] | None = None) -> ShuffledOrder:
        """Continue an interrupted stream; ``rows`` are those that there are now."""
        order = cls(state["seed"], [Part(*part) for part in state["parts"]], state["taken"])
        now = order.parts if rows is None else cls(order.seed, rows).parts
        if now != order.parts:
            raise RequestError(
                f"the data set has {_describe(now)} rows, but had {_describe(order.parts)} when this order was saved: "
                "resume with the same data, or start a new run"
            )
        return order

    def _epoch(self, number: int) -> list[int]:
        if self._permutation is None or self._permutation[0] != number:
            rows, first = [], 0
            for place, part in enumerate(self.parts):
                rows += [first + row for row in self._take_from_part(place, part, number)]
                first += part.size
            random.Random(f"order/{self.seed}/{number}").shuffle(rows)
            self._permutation = (number, rows)
        return self._permutation[1]

    def _take_from_part(self, place: int, part: Part, epoch: int) -> list[int]:
        """What an epoch takes of a part, sorted.

        A part is dealt out permutation after permutation, and each epoch takes the next ``per_epoch`` rows of this endless
        sequence: so rows come equally often, to within one, whatever the weight.
        """
        if part.per_epoch == part.size:
            return list(range(part.size))
        start, end = epoch * part.per_epoch, (epoch + 1) * part.per_epoch
        rows: list[int] = []
        for turn in range(start // part.size, -(-end // part.size)):  # -(-a // b) rounds a / b up
            permutation = list(range(part.size))
            random.Random(f"order/{self.seed}/part {place}/{turn}").shuffle(permutation)
            before = turn * part.size
            rows += permutation[max(start - before, 0) : end - before]
        return sorted(rows)


def _describe(parts: Sequence[Part]) -> str:
    """The sizes of parts, each with what an epoch takes where that is another number."""
    return " + ".join(f"{size}" if size == count else f"{size} (an epoch takes {count})" for size, count in parts)
