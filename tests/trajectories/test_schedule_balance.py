"""Work is spread evenly: over micro-batches, over ranks, and over the turns in which ranks run side by side."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.trajectories.schedule import make_schedule, work
from tests.trajectories.schedule_problems import Problem, balance, problems, rank_work


def test_work_is_tokens_plus_attention_that_grows_with_the_square() -> None:
    assert work(12_288) == 2 * 12_288
    assert work(1) == pytest.approx(1, rel=1e-4)
    assert work(40) - 40 == pytest.approx(4 * (work(20) - 20))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=80), st.integers(1, 8))
def test_one_micro_batch_a_rank_is_as_even_as_graham_proves(lengths: list[int], ranks: int) -> None:
    """Where there is room for everything, longest first to the least loaded keeps Graham's bound (1969)."""
    update = make_schedule(lengths, ranks=ranks, max_tokens=sum(lengths)).updates[0]
    totals = rank_work(update, lengths)
    longest = max(map(work, lengths))
    assert max(totals) <= sum(totals) / ranks + longest * (1 - 1 / ranks) + 1e-6
    if len(lengths) <= ranks:
        assert max(totals) == pytest.approx(longest)


@st.composite
def many_short_sequences(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """At least 24 sequences a rank, none longer than a sixth of the budget."""
    ranks = draw(st.integers(1, 8))
    budget = draw(st.sampled_from([60, 600, 4096, 60_000]))
    shortest = draw(st.sampled_from([1, budget // 60, budget // 12, budget // 8]))
    seed = draw(st.integers(0, 2**32))
    count = ranks * draw(st.integers(24, 80))
    chance = random.Random(seed)
    return [chance.randint(shortest, budget // 6) for _ in range(count)], ranks, budget


@settings(max_examples=100, deadline=None)
@given(many_short_sequences())
def test_many_short_sequences_are_balanced_within_a_tenth(problem: tuple[list[int], int, int]) -> None:
    lengths, ranks, budget = problem
    for update in make_schedule(lengths, ranks=ranks, max_tokens=budget).updates:
        assert balance(update, lengths) <= 1.10  # 1.062 was the worst of 30,000 draws


@settings(max_examples=60, deadline=None)
@given(problems())
def test_turns_run_from_heavy_to_light_and_ranks_differ_by_no_more_than_a_turn(problem: Problem) -> None:
    """A collective waits for the slowest rank of a turn, so even totals are not enough: turns are cut from sorted work.

    When each turn's heaviest goes to the rank with the least so far, totals differ by at most the widest turn.
    """
    for update in problem.solve().updates:
        turns = [
            [sum(work(problem.lengths[i]) for i in micro_batch) for micro_batch in turn]
            for turn in zip(*update.micro_batches, strict=True)
        ]
        assert all(min(turn) >= max(after) - 1e-6 for turn, after in pairwise(turns))
        totals = rank_work(update, problem.lengths)
        assert max(totals) - min(totals) <= max(max(turn) - min(turn) for turn in turns) + 1e-6


def test_long_sequences_count_for_their_attention() -> None:
    """One sequence of 24,576 tokens is the work (73,728) of 30 of 2,048 (71,680), which have 61,440 tokens."""
    lengths = [24_576] + [2_048] * 30
    update = make_schedule(lengths, ranks=2, max_tokens=100_000).updates[0]
    long, short = sorted(update.micro_batches, key=lambda rank: 0 not in rank[0])
    assert long == ((0,),)
    assert len(short[0]) == 30
