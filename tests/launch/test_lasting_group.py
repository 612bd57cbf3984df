"""Every request ends in one result, in order; an item that kills its group costs only itself its score; a group that fails on
everything is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf_ray.errors import GroupError
from rlhf_ray.launch.lasting_group import LastingGroup
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult


class Group:
    """Scores an item with its length, and dies of the lengths in ``poison``; once dead, it scores nothing."""

    def __init__(self, poison: set[int]) -> None:
        self.poison, self.alive = poison, True

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        lengths = [len(request.token_ids or ()) for request in requests]
        self.alive = self.alive and self.poison.isdisjoint(lengths)
        alive = self.alive

        def wait() -> list[ScoreResult]:
            if not alive:
                raise GroupError("reward", 0, "score", "its process died\nand more")
            return [ScoreResult.of(float(length)) for length in lengths]

        return Pending(wait)


class Starts(list[Group]):
    """All groups that were started, each in the place of the last one."""

    def __init__(self, *poison: int) -> None:
        self.poison = set(poison)

    def __call__(self, failed: Group | None) -> Group:
        assert failed is (self[-1] if self else None)
        self.append(Group(self.poison))
        return self[-1]


def items(*lengths: int) -> list[ScoreRequest]:
    return [ScoreRequest(token_ids=(7,) * length) for length in lengths]


@pytest.mark.parametrize("place", range(9))
def test_an_item_that_kills_its_group_costs_no_other_its_score(place: int) -> None:
    lengths = [number + 2 for number in range(9)]
    starts = Starts(place + 2, 40)
    group = LastingGroup(starts)
    chunks = [group.score(items(*lengths)), group.score(items(3 + place, 40)), group.score(items(20))]
    first, second, third = (chunk.result() for chunk in chunks)
    assert [result.raw for result in first] == [None if n == place + 2 else float(n) for n in lengths]
    assert (
        first[place].error == "the reward group fails on this item: its process died" and first[place].fault == "item"
    )
    assert [result.raw for result in second] == [float(3 + place), None] and third[0].raw == 20.0
    assert len(starts) < 14, "halves, not one group an item"


def test_a_group_that_fails_on_everything_is_an_error() -> None:
    starts = Starts(*range(100))
    with pytest.raises(GroupError, match="its process died"):
        LastingGroup(starts).score(items(*range(1, 65))).result()
    assert len(starts) < 12
