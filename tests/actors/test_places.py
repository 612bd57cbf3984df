"""Places of a job as they are taken, left, given back and reserved anew, without Ray."""

from __future__ import annotations

import importlib
from typing import Any, cast

import pytest

from rlhf_ray.actors import reservation
from rlhf_ray.actors.reservation import Elsewhere, Reservation, reserve
from rlhf_ray.planning.capacity import Bundle
from rlhf_ray.planning.placement import Node


def reserved(*bundles: Bundle) -> Reservation:
    """Places that nobody has to reserve."""
    return Reservation(cast("Any", None), bundles, "")


def test_groups_of_one_model_get_places_of_their_own_and_one_that_is_started_again_those_that_it_has_left() -> None:
    places = reserved(Bundle("other", 1.0), *[Bundle("reward", 1.0)] * 4)
    assert [places.take("reward", "reward", 0, 2) for _ in range(3)] == [1, 3, None], "a third has none"
    places.leave("reward", 1, 2)
    assert places.take("reward", "reward", 0, 2) == 1
    assert places.take("missing", "missing", 0, 1) is None
    shared = reserved(*[Bundle("policy + critic", 2.0)] * 2)
    assert [shared.take("policy + critic", role, 0, 2) for role in ("policy", "critic", "policy")] == [0, 0, None]
    engines = reserved(*[Bundle("rollout", 1.0)] * 3)
    assert [engines.take("rollout", "rollout", number, 1) for number in (2, 0, 1)] == [2, 0, 1]


class Held:
    """A reservation whose node may die."""

    def __init__(self, name: str) -> None:
        self.placement, self.alive, self.given_back = name, True, False

    def lives(self) -> bool:
        return self.alive

    def give_back(self) -> None:
        self.given_back = True


def test_another_place_is_kept_while_its_node_lives_and_given_back_before_the_next_is_reserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Held] = []

    def reserve_next(bundles: list[Bundle], name: str) -> Held:
        assert all(one.given_back for one in held if not one.alive)
        held.append(Held(name))
        return held[-1]

    monkeypatch.setattr(reservation, "reserve_when_there_is_room", reserve_next)
    elsewhere, bundles = Elsewhere(), [Bundle("rollout", 0.5)]
    assert [elsewhere.places("rollout", 0, bundles, name) for name in ("one", "two")] == ["one", "one"]
    assert elsewhere.places("rollout", 1, bundles, "other") == "other"
    held[0].alive = False
    assert elsewhere.places("rollout", 0, bundles, "three") == "three"
    assert [one.given_back for one in held] == [True, False, False]
    for rank in (0, 1, 1):
        elsewhere.give_back("rollout", rank)
    assert all(one.given_back for one in held)


def test_each_attempt_to_reserve_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a name that another placement group has, or had until just now."""
    names: list[str] = []

    class Attempt:
        def wait(self, timeout_seconds: float) -> bool:
            return len(names) == 3

    def next_attempt(bundles: list[Bundle], labels: list[dict[str, str]], name: str) -> Attempt:
        names.append(name)
        return Attempt()

    monkeypatch.setattr(reservation, "free_nodes", lambda: [Node("here", 2.0)])
    monkeypatch.setattr(reservation, "_placement_group", next_attempt)
    module = importlib.import_module("ray.util.placement_group")  # its package has a function of the same name
    monkeypatch.setattr(module, "remove_placement_group", lambda placement: None)
    reserve([Bundle("rollout", 0.1)], "rlhf/run/all", 30.0)
    assert len(set(names)) == 3 and all(name.startswith("rlhf/run/all") for name in names)
