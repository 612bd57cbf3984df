"""Each epoch holds each row once; a stream continued from its state is the one that was interrupted."""

from __future__ import annotations

import json
from bisect import bisect
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.order import Part, ShuffledOrder
from rlhf_ray.errors import RequestError

SIZES = st.integers(1, 30)
COUNTS = st.lists(st.integers(0, 70), max_size=6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), size=SIZES, epochs=st.integers(1, 4))
def test_each_epoch_holds_each_row_once(seed, size, epochs):
    order = ShuffledOrder(seed, size)
    for epoch in range(epochs):
        assert order.epoch == epoch
        assert sorted(order.take(size)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9), size=SIZES, counts=COUNTS)
def test_however_rows_are_taken_and_resumed_the_stream_is_the_same(seed, size, counts):
    whole = ShuffledOrder(seed, size).take(sum(counts) + 2 * size)
    order, taken = ShuffledOrder(seed, size), []
    for count in counts:
        taken += order.take(count)
        order = ShuffledOrder.from_state(json.loads(json.dumps(order.state())), size)
    assert taken == whole[: len(taken)]
    assert order.take(2 * size) == whole[len(taken) :], "a resumed stream goes on, over the end of an epoch too"


PARTS = st.lists(st.builds(Part, st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 9), parts=PARTS, epochs=st.integers(1, 4))
def test_a_mixture_is_exact_in_every_epoch_and_uses_the_rows_of_a_part_equally(seed, parts, epochs):
    order, used = ShuffledOrder(seed, parts), Counter()
    ends = list(accumulate(part.size for part in parts))
    for epoch in range(1, epochs + 1):
        rows = order.take(order.epoch_size)
        assert Counter(bisect(ends, row) for row in rows) == {place: part.per_epoch for place, part in enumerate(parts)}
        used.update(rows)
        for place, part in enumerate(parts):
            counts = [used[row] for row in range(ends[place] - part.size, ends[place])]
            assert sum(counts) == epoch * part.per_epoch
            assert max(counts) - min(counts) <= 1


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 9), parts=PARTS, counts=COUNTS)
def test_a_mixture_killed_anywhere_goes_on_with_the_very_next_row(seed, parts, counts):
    whole = ShuffledOrder(seed, parts).take(sum(counts) + 50)
    order, taken = ShuffledOrder(seed, parts), []
    for count in counts:
        taken += order.take(count)
        order = ShuffledOrder.from_state(json.loads(json.dumps(order.state())), parts)
    assert taken + order.take(50) == whole


def test_weights_say_how_often_an_epoch_uses_each_row():
    assert [Part.weighted(10, weight).per_epoch for weight in (1, 2, 0.5, 0.25, 0.01)] == [10, 20, 5, 2, 1]
    halves = ShuffledOrder(0, [Part.weighted(10, 0.5)])
    assert sorted(halves.take(5) + halves.take(5)) == list(range(10)), "the other half next time"
    assert ShuffledOrder(3, [Part(8, 8)]).take(16) == ShuffledOrder(3, 8).take(16), "one part is no mixture"


def test_epochs_and_seeds_differ():
    order = ShuffledOrder(0, 100)
    first, second = order.take(100), order.take(100)
    assert len({tuple(first), tuple(second), tuple(ShuffledOrder(1, 100).take(100)), tuple(range(100))}) == 4


def test_every_order_is_as_likely_as_any_other():
    """Over 6,000 seeds each of the 6 orders of three rows comes about 1,000 times (5 deviations are 144)."""
    counts = Counter(tuple(ShuffledOrder(seed, 3).take(3)) for seed in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_the_order_of_a_seed_never_changes():
    """Runs are resumed by newer versions: this order is written down."""
    assert ShuffledOrder(0, 8).take(16) == [1, 3, 7, 4, 2, 0, 5, 6, 5, 2, 1, 0, 6, 4, 3, 7]


def test_bad_orders_are_refused():
    with pytest.raises(RequestError, match="at least one row"):
        ShuffledOrder(0, 0)
    with pytest.raises(RequestError, match="cannot have given out -1"):
        ShuffledOrder(0, 3, -1)
    state = ShuffledOrder(0, 3).state()
    with pytest.raises(RequestError, match="has 4 rows, but had 3 when this order was saved"):
        ShuffledOrder.from_state(state, 4)
    with pytest.raises(RequestError, match=r"has 3 \(an epoch takes 6\) rows, but had 3 when"):
        ShuffledOrder.from_state(state, [Part(3, 6)])
