"""Each epoch holds each row once; a stream continued from its state is the one that was interrupted."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.order import ShuffledOrder
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


def test_epochs_and_seeds_differ():
    order = ShuffledOrder(0, 100)
    first, second = order.take(100), order.take(100)
    assert len({tuple(first), tuple(second), tuple(ShuffledOrder(1, 100).take(100)), tuple(range(100))}) == 4


def test_every_order_is_as_likely_as_any_other():
    """Over 6,000 seeds each of the 6 orders of three rows comes about 1,000 times (5 deviations are 144)."""
    found = Counter(tuple(ShuffledOrder(seed, 3).take(3)) for seed in range(6000))
    assert len(found) == 6
    assert all(abs(count - 1000) < 150 for count in found.values())


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
