"""Random scheduling problems, and measures of how evenly a schedule spreads the work."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, pairwise

from hypothesis import strategies as st

from rlhf_ray.trajectories.schedule import Schedule, Update, make_schedule, work


@dataclass(frozen=True)
class Problem:
    lengths: list[int]
    ranks: int
    max_tokens: int
    sequences_per_update: int | None
    order: list[int]
    unit: int

    def solve(self) -> Schedule:
        return make_schedule(
            self.lengths,
            ranks=self.ranks,
            max_tokens=self.max_tokens,
            sequences_per_update=self.sequences_per_update,
            order=self.order,
            unit=self.unit,
        )

    def units(self, sequences: list[int]) -> list[tuple[int, ...]]:
        return [tuple(sequences[i : i + self.unit]) for i in range(0, len(sequences), self.unit)]

    def chunks(self) -> list[list[int]]:
        size = self.sequences_per_update or len(self.order) or 1
        return [self.order[i : i + size] for i in range(0, len(self.order), size)]

    def tokens(self, sequences: tuple[int, ...]) -> int:
        return sum(self.lengths[i] for i in sequences)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Mostly hard ones: packing is a puzzle when a few sequences fill a micro-batch, or exactly fill it."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    unit = draw(st.sampled_from([1, 1, 1, 2, 3]))
    max_tokens = draw(st.sampled_from([12, 120, 40_000])) * unit
    if unit == 1 and draw(st.booleans()):
        pieces = [cut_exactly(max_tokens, chance.randint(2, 4), chance) for _ in range(draw(st.integers(0, 18)))]
        lengths = list(chain.from_iterable(pieces))
    else:
        shortest = draw(st.sampled_from([1, max_tokens // unit // 6, max_tokens // unit // 4]))
        longest = draw(st.sampled_from([max_tokens // unit // 3, max_tokens // unit // 2, max_tokens // unit]))
        count = draw(st.integers(0, 8) | st.integers(20, 60)) * unit
        lengths = [chance.randint(shortest, longest) for _ in range(count)]
    return Problem(
        lengths=lengths,
        ranks=draw(st.sampled_from([1, 2, 2, 3, 8])),
        max_tokens=max_tokens,
        sequences_per_update=draw(st.none() | st.integers(1, 40).map(lambda units: units * unit)),
        order=chance.sample(range(len(lengths)), len(lengths)),
        unit=unit,
    )


def cut_exactly(tokens: int, pieces: int, chance: random.Random) -> list[int]:
    cuts = [0, *sorted(chance.sample(range(1, tokens), pieces - 1)), tokens]
    return [end - start for start, end in pairwise(cuts)]


def flat(update: Update) -> list[int]:
    return [i for rank in update.micro_batches for micro_batch in rank for i in micro_batch]


def rank_work(update: Update, lengths: list[int]) -> list[float]:
    return [sum(work(lengths[i]) for micro_batch in rank for i in micro_batch) for rank in update.micro_batches]


def balance(update: Update, lengths: list[int]) -> float:
    """Work of the busiest rank over what no schedule can go below: the mean, and the longest sequence."""
    totals = rank_work(update, lengths)
    return max(totals) / max(sum(totals) / len(totals), max(work(lengths[i]) for i in update.sequences))
