"""Every sequence is in exactly one pack; no pack has more than ``max_tokens`` tokens; a unit is never split; every rank has
the longest units first; all streams end within the work of ``SMALLEST_PACK`` tokens and of one unit, the largest, of each
other; equal input gives equal packs.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.trajectories.length_packs import SMALLEST_PACK, make_length_packs
from rlhf_ray.trajectories.schedule import MicroBatch, work


@dataclass(frozen=True)
class Problem:
    lengths: list[int]
    units: list[tuple[int, ...]]
    ranks: int
    streams: int
    max_tokens: int

    def solve(self) -> list[list[MicroBatch]]:
        return make_length_packs(
            self.lengths, self.units, ranks=self.ranks, streams=self.streams, max_tokens=self.max_tokens
        )

    def work_of(self, sequences: tuple[int, ...]) -> float:
        return sum(work(self.lengths[i]) for i in sequences)

    def ends(self) -> list[float]:
        """When each stream ends that takes the next pack of its rank as soon as it is free."""
        ends = []
        for packs in self.solve():
            streams = [0.0] * self.streams
            for pack in packs:
                heapq.heapreplace(streams, streams[0] + self.work_of(pack))
            ends += streams
        return ends


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    chance = random.Random(draw(st.integers(0, 2**32)))
    longest = draw(st.sampled_from([5, 50, 500, 3000]))
    lengths = [chance.randint(1, longest) for _ in range(draw(st.integers(1, 200)))]
    order = chance.sample(range(len(lengths)), len(lengths))
    units = []
    while order:
        size = chance.choice([1, 1, 1, 2, 3])
        units.append(tuple(order[:size]))
        order = order[size:]
    largest = max(sum(lengths[i] for i in unit) for unit in units)
    budget = largest * draw(st.sampled_from([1, 1.3, 2, 5, 50]))
    ranks, streams = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Problem(lengths, units, ranks, streams, int(budget))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_every_sequence_is_in_one_pack_within_the_budget(problem: Problem) -> None:
    dealt = problem.solve()
    packs = list(chain.from_iterable(dealt))
    assert len(dealt) == problem.ranks
    assert sorted(chain.from_iterable(packs)) == list(range(len(problem.lengths)))
    assert all(packs) and all(sum(problem.lengths[i] for i in pack) <= problem.max_tokens for pack in packs)
    assert dealt == problem.solve()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_unit_is_whole_and_none_is_longer_than_the_one_before(problem: Problem) -> None:
    unit_of = {unit[0]: unit for unit in problem.units}
    for packs in problem.solve():
        row = list(chain.from_iterable(packs))
        longest = []
        while row:
            unit = unit_of[row[0]]
            assert tuple(row[: len(unit)]) == unit
            longest.append(max(problem.lengths[i] for i in unit))
            row = row[len(unit) :]
        assert longest == sorted(longest, reverse=True)
        ends = [pack[-1] for pack in packs]
        assert set(ends) <= {unit[-1] for unit in problem.units}, "no pack ends within a unit"


@settings(max_examples=200, deadline=None)
@given(problems())
def test_no_stream_waits_long_for_another(problem: Problem) -> None:
    ends = problem.ends()
    if len(ends) > 1:
        assert max(ends) - min(ends) <= SMALLEST_PACK + max(map(problem.work_of, problem.units))


def test_large_packs_come_first_and_none_is_small_without_need() -> None:
    """50,000 tokens for two streams: full packs, then two thirds of half of what is left, then SMALLEST_PACK."""
    problem = Problem([100] * 500, [(i,) for i in range(500)], 1, 2, 4000)
    tokens = [100 * len(pack) for pack in problem.solve()[0]]
    assert tokens[:9] == [4000] * 9 and tokens == sorted(tokens, reverse=True)
    assert all(size >= SMALLEST_PACK - 100 for size in tokens[:-1]) and len(tokens) <= 18


def test_few_sequences_are_shared_out_evenly() -> None:
    """None is idle, none gets a second pack: what a pack costs besides its tokens comes once for each."""
    for length in (10, 900):
        packs = Problem([length] * 16, [(i,) for i in range(16)], 2, 2, 4000).solve()
        assert [list(map(len, rank)) for rank in packs] == [[4, 4], [4, 4]]


def test_a_single_stream_fills_its_packs() -> None:
    packs = Problem([100] * 95, [(i,) for i in range(95)], 1, 1, 1000).solve()
    assert [len(pack) for pack in packs[0]] == [10] * 9 + [5]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "refusal"), [([5, 0], 10, "sequence 1 has 0 tokens"), ([11], 10, "11 tokens")]
)
def test_what_cannot_be_packed_is_named(lengths: list[int], max_tokens: int, refusal: str) -> None:
    with pytest.raises(RequestError, match=refusal):
        make_length_packs(lengths, [(i,) for i in range(len(lengths))], ranks=1, streams=1, max_tokens=max_tokens)
