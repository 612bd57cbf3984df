"""Every sequence is in exactly one micro-batch; update k holds the k-th chunk of ``order``; no micro-batch has more
than ``max_tokens`` tokens; a unit is never split; within an update every rank has the same number of micro-batches
(only a rank's last one can be a dummy), in all what best-fit packing needs, rounded up to the ranks; and equal input
gives an equal schedule.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import time
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.trajectories.schedule import deal_packs, make_schedule
from tests.trajectories.schedule_problems import Problem, balance, flat, problems


@settings(max_examples=60, deadline=None)
@given(problems())
def test_nothing_is_lost_and_nothing_comes_twice(problem: Problem) -> None:
    everything = [i for update in problem.solve().updates for i in flat(update)]
    assert sorted(everything) == list(range(len(problem.lengths)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_update_k_holds_the_kth_chunk_of_the_order(problem: Problem) -> None:
    schedule = problem.solve()
    assert [sorted(flat(update)) for update in schedule.updates] == [sorted(chunk) for chunk in problem.chunks()]
    assert len(schedule.updates) == len(problem.chunks())


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_micro_batch_is_over_the_budget(problem: Problem) -> None:
    for update in problem.solve().updates:
        for micro_batch in chain.from_iterable(update.micro_batches):
            assert problem.tokens(micro_batch) <= problem.max_tokens


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_rank_has_the_same_number_and_only_its_last_is_a_dummy(problem: Problem) -> None:
    for update in problem.solve().updates:
        assert len(update.micro_batches) == problem.ranks
        assert len({len(rank) for rank in update.micro_batches}) == 1
        assert len(update.micro_batches[0]) >= 1
        assert all(micro_batch for rank in update.micro_batches for micro_batch in rank[:-1])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_dealt_packs_are_those_of_one_rank_however_many_there_are(problem: Problem) -> None:
    packs, shares = set(), []
    for ranks in (1, problem.ranks):
        dealt = deal_packs(problem.lengths, ranks=ranks, max_tokens=problem.max_tokens, unit=problem.unit)
        shares = [dealt.rank(rank) for rank in range(ranks)]
        packs.add(frozenset(filter(None, chain.from_iterable(shares))))
        assert sorted(chain.from_iterable(chain.from_iterable(shares))) == list(range(len(problem.lengths)))
        assert len({len(share) for share in shares}) == 1
        assert all(share[:-1] == tuple(filter(None, share[:-1])) for share in shares)
    alone = make_schedule(problem.lengths, ranks=1, max_tokens=problem.max_tokens, unit=problem.unit)
    assert packs == {frozenset(alone.rank(0))}


@given(problems())
def test_units_stay_together_next_to_each_other_and_in_order(problem: Problem) -> None:
    for update, chunk in zip(problem.solve().updates, problem.chunks(), strict=True):
        whole = set(problem.units(chunk))
        for micro_batch in chain.from_iterable(update.micro_batches):
            assert set(problem.units(list(micro_batch))) <= whole


@settings(max_examples=60, deadline=None)
@given(problems())
def test_without_units_a_micro_batch_is_ascending(problem: Problem) -> None:
    if problem.unit == 1:
        for update in problem.solve().updates:
            for micro_batch in chain.from_iterable(update.micro_batches):
                assert list(micro_batch) == sorted(micro_batch)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_equal_input_gives_an_equal_schedule(problem: Problem) -> None:
    again = Problem(
        list(problem.lengths),
        problem.ranks,
        problem.max_tokens,
        problem.sequences_per_update,
        list(problem.order),
        problem.unit,
    )
    assert problem.solve() == again.solve()


@settings(max_examples=60, deadline=None)
@given(problems())
def test_views_of_the_schedule_agree_with_it(problem: Problem) -> None:
    schedule = problem.solve()
    assert schedule.sequences == tuple(range(len(problem.lengths)))
    for update in schedule.updates:
        assert update.sequences == tuple(sorted(flat(update)))
    for rank in range(problem.ranks):
        parts = [update.rank(rank) for update in schedule.updates]
        assert parts == [update.micro_batches[rank] for update in schedule.updates]
        assert schedule.rank(rank) == tuple(chain.from_iterable(parts))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_order_may_be_left_out(problem: Problem) -> None:
    straight = Problem(
        sorted(problem.lengths), problem.ranks, 10**6, problem.sequences_per_update, sorted(problem.order), problem.unit
    )
    without = make_schedule(
        straight.lengths,
        ranks=straight.ranks,
        max_tokens=10**6,
        sequences_per_update=straight.sequences_per_update,
        unit=straight.unit,
    )
    assert without == straight.solve()


# How many micro-batches


def slow_best_fit(sizes: list[int], budget: int) -> int:
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, used in enumerate(bins) if used + size <= budget]
        if fitting:
            bins[max(fitting, key=lambda number: bins[number])] += size
        else:
            bins.append(size)
    return len(bins)


def fewest_bins(sizes: list[int], budget: int) -> int:
    """Exact, by trying every bin for every size."""
    best = len(sizes)

    def place(position: int, bins: list[int]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if position == len(sizes):
            best = len(bins)
            return
        for number, used in enumerate(bins):
            if used + sizes[position] <= budget:
                place(position + 1, [*bins[:number], used + sizes[position], *bins[number + 1 :]])
        place(position + 1, [*bins, sizes[position]])

    place(0, [])
    return best


@settings(max_examples=60, deadline=None)
@given(problems())
def test_there_are_as_many_micro_batches_as_best_fit_needs(problem: Problem) -> None:
    for update, chunk in zip(problem.solve().updates, problem.chunks(), strict=True):
        bins = slow_best_fit([problem.tokens(unit) for unit in problem.units(chunk)], problem.max_tokens)
        assert len(update.rank(0)) == math.ceil(bins / problem.ranks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(30, 60), st.integers(1, 3))
def test_there_are_hardly_more_micro_batches_than_the_fewest_possible(
    lengths: list[int], budget: int, ranks: int
) -> None:
    fewest = fewest_bins(lengths, budget)
    per_rank = len(make_schedule(lengths, ranks=ranks, max_tokens=budget).updates[0].rank(0))
    assert math.ceil(fewest / ranks) <= per_rank <= math.ceil((11 / 9 * fewest + 6 / 9) / ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("lengths", "budget", "micro_batches"),
    [
        # Spreading work evenly would begin with 6 | 6, then 5 and 4, and has no room for 3.
        ([5, 4, 3, 6, 6], 12, [(0, 1, 2), (3, 4)]),
        # 3 must go to 7, the fuller one: beside 6 it would leave no room for the last 2.
        ([7, 6, 3, 2, 2], 10, [(0, 2), (1, 3, 4)]),
    ],
)
def test_what_only_fits_tightly_is_packed_tightly(
    lengths: list[int], budget: int, micro_batches: list[tuple[int, ...]], ranks: int
) -> None:
    update = make_schedule(lengths, ranks=ranks, max_tokens=budget).updates[0]
    assert sorted(chain.from_iterable(update.micro_batches)) == micro_batches


# Refusals, speed, imports


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lengths": [3, 50, 4], "max_tokens": 40}, ["sequence 1 has 50 tokens", "max_tokens_per_micro_batch is 40"]),
        (
            {"lengths": [30, 1, 20, 30], "unit": 2, "max_tokens": 40},
            ["sequences 2, 3", "50 tokens", "is 40", "or more"],
        ),
        ({"lengths": [3, 0]}, ["sequence 1 has 0 tokens"]),
        ({"lengths": [3, 2, 4], "unit": 2}, ["number of sequences is 3", "multiple of 2"]),
        (
            {"lengths": [3, 2, 4, 4], "unit": 2, "sequences_per_update": 3},
            ["sequences_per_update is 3", "multiple of 2"],
        ),
        ({"lengths": [3], "ranks": 0}, ["ranks is 0"]),
        ({"lengths": [3], "max_tokens": 0}, ["max_tokens is 0"]),
        ({"lengths": [3], "unit": 0}, ["unit is 0"]),
        ({"lengths": [3], "sequences_per_update": 0}, ["sequences_per_update is 0"]),
        ({"lengths": [3, 3], "order": [0, 2]}, ["order names sequence 2", "2 sequences"]),
        ({"lengths": [3, 3], "order": [0, -1]}, ["order names sequence -1"]),
        ({"lengths": [3, 3], "order": [1, 1]}, ["order names sequence 1 twice"]),
        ({"lengths": [3, 3, 3], "order": [2, 0]}, ["order lacks sequence 1"]),
    ],
)
def test_what_cannot_be_scheduled_is_refused_by_name(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        make_schedule(**{"ranks": 2, "max_tokens": 100, **arguments})  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("unit", [1, 2])
def test_nothing_to_schedule_is_no_update(unit: int) -> None:
    schedule = make_schedule([], ranks=3, max_tokens=5, unit=unit)
    assert schedule.updates == () and schedule.sequences == () and schedule.rank(2) == ()


def test_ranks_without_a_sequence_run_one_dummy() -> None:
    assert sorted(make_schedule([7], ranks=3, max_tokens=7).updates[0].micro_batches) == [((),), ((),), ((0,),)]


@pytest.mark.parametrize("longest", [400, 2048], ids=["short", "up to the budget"])
def test_twenty_thousand_sequences_on_64_ranks_take_seconds(longest: int) -> None:
    chance = random.Random(1)
    lengths = [chance.randint(1, longest) for _ in range(20_000)]
    start = time.perf_counter()
    schedule = make_schedule(lengths, ranks=64, max_tokens=2048)
    assert time.perf_counter() - start < 10  # takes about half a second
    assert len(schedule.sequences) == 20_000
    assert balance(schedule.updates[0], lengths) <= 1.01


def test_a_fresh_process_needs_no_torch_and_finds_the_same_schedule() -> None:
    program = (
        "import sys; import rlhf_ray.trajectories; from rlhf_ray.trajectories.schedule import make_schedule;"
        "from rlhf_ray.trajectories import make_schedule as the_same; assert the_same is make_schedule;"
        "assert not {'torch', 'numpy', 'ray'} & set(sys.modules);"
        "print(make_schedule([i * 37 % 90 + 1 for i in range(200)], ranks=3, max_tokens=100, sequences_per_update=64))"
    )
    expected = make_schedule([i * 37 % 90 + 1 for i in range(200)], ranks=3, max_tokens=100, sequences_per_update=64)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == repr(expected)
