"""Batches hold every sequence once, within the budget, with little padding; they cost half of batches in arrival order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.trajectories.length_batches import ALIKE, SHORTEST, make_length_batches

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 900), st.booleans())
def test_every_sequence_is_in_one_batch_of_similar_lengths(lengths: list[int], budget: int, padded: bool) -> None:
    batches = make_length_batches(lengths, max_tokens=budget, padded=padded)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[index] for index in batch]
        assert len(batch) == 1 or max(own) * len(own) <= budget
        assert min(own) >= (min(max(own) * SHORTEST, max(own) - ALIKE) if padded else max(own))
    if batches and budget >= sum(lengths) and len(set(lengths)) == 1:
        assert len(batches) == 1, "a batch is cut only where it must be"


@pytest.mark.parametrize("lengths", [
    [random.Random(1).randint(8, 512) for _ in range(1)] + [random.Random(n).randint(8, 512) for n in range(255)],
    [min(512, max(8, int(random.Random(n).lognormvariate(4.5, 0.9)))) for n in range(256)],
])  # fmt: skip
def test_mixed_lengths_are_hardly_padded(lengths: list[int]) -> None:
    """Batches of 16 in arrival order compute about twice the tokens that there are."""

    def computed(batches: list[tuple[int, ...]]) -> int:
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)

    arrival = [tuple(range(start, start + 16)) for start in range(0, 256, 16)]
    ours = make_length_batches(lengths, max_tokens=2048)
    assert computed(ours) < 1.1 * sum(lengths) and computed(arrival) > 1.6 * sum(lengths)
