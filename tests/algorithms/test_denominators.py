"""A denominator counts over the whole update and is at least 1."""

from __future__ import annotations

import pytest

from rlhf_ray.algorithms.denominators import denominator


def test_each_kind_counts_what_its_name_says(ragged) -> None:
    batch = ragged([5, 9, 3, 4], 5)
    actions = [int(batch.select([row])["action_mask"].sum()) for row in range(4)]
    assert all(actions)
    assert len(set(actions)) > 1
    assert denominator("tokens", batch, [2, 1]) == actions[2] + actions[1]
    assert denominator("sequences", batch, [0, 3, 1]) == 3
    assert denominator("pairs", batch, (0, 1, 2, 3)) == 2
    assert denominator("answers", ragged([5, 1, 9], 5), [0, 1, 2]) == 2  # a sequence of one token has no action
    assert isinstance(denominator("tokens", batch, range(4)), float)


@pytest.mark.parametrize("kind", ["tokens", "answers", "sequences", "pairs"])
def test_an_update_in_which_nothing_counts_divides_by_one(ragged, kind) -> None:
    assert denominator(kind, ragged([1, 1], 0), []) == 1.0
    assert denominator("tokens", ragged([1, 1], 0), [0, 1]) == 1.0


@pytest.mark.usefixtures("outside_pytest")
def test_half_a_pair_and_an_unknown_kind_are_refused(ragged) -> None:
    with pytest.raises(ValueError, match="3 sequences are not whole pairs"):
        denominator("pairs", ragged([2, 2, 2], 0), [0, 1, 2])
    with pytest.raises(ValueError, match="'token' is unknown: use one of tokens, answers, sequences, pairs"):
        denominator("token", ragged([2], 0), [0])
