"""Places for ranks on a Ray cluster: found node by node, then reserved all together.

Invariants: every place is reserved in one placement group of Ray, which comes about as a whole or not at all, on the nodes that
``planning/placement.py`` has assigned. Nothing is held while there is no room: an attempt that others were faster than is
given up before the next one looks at the nodes anew. Ranks whose node has died hold one other reservation at most.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING

from rlhf_ray.actors.nodes import NODE_LABEL, free_nodes
from rlhf_ray.errors import CapacityError, GroupError
from rlhf_ray.planning.capacity import Bundle, require_fit
from rlhf_ray.planning.placement import MARK, assign, picture

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

ATTEMPT_S = 10.0
"""How long Ray may take to reserve what is free; then another has taken it."""
LOOKS_AGAIN_S = 0.25
SETTLES_S = 3.0
"""How long Ray may take to count as free what a job before this one has left."""


class Reservation:
    """The placement group that holds ``bundles``, one place for each, in order."""

    def __init__(self, placement: PlacementGroup, bundles: Sequence[Bundle], shown: str) -> None:
        self.placement = placement
        self._bundles = list(bundles)
        self._taken: set[tuple[str, int]] = set()
        self.picture = shown
        """Which rank is on which node, as a table."""

    def take(self, role: str, group: str, first_rank: int, ranks: int) -> int | None:
        """Take ``ranks`` places of ``role`` in a row, from its place number ``first_rank`` on; returns the index of the first.

        Groups of one name get places of their own, and others may lie in the same ones. None where none are left: a model that
        takes over from another one has its ranks beside that one's.
        """
        places = [index for index, bundle in enumerate(self._bundles) if bundle.role == role]
        for begin in range(first_rank, len(places) - ranks + 1, ranks):
            wanted = {(group, index) for index in places[begin : begin + ranks]}
            if not wanted & self._taken:
                self._taken |= wanted
                return places[begin]
        return None

    def leave(self, group: str, first: int, ranks: int) -> None:
        """Leave places to the next group of this name; they stay reserved."""
        self._taken -= {(group, index) for index in range(first, first + ranks)}

    def lives(self) -> bool:
        """Whether every place is on a node that lives; not so while Ray still looks for one."""
        return on_live_nodes(self.placement, range(len(self._bundles)))

    def give_back(self) -> None:
        """Give all places back. A second call does nothing."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self.placement)


class Elsewhere:
    """Other places for ranks whose node has died, by the name of their group and their first rank."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Reservation] = {}

    def places(self, group: str, first_rank: int, bundles: Sequence[Bundle], name: str) -> PlacementGroup:
        """Those that these ranks hold, while their nodes live; otherwise they are given back for others, called ``name``.

        Ray refuses a name that another placement group has, or had until just now.
        """
        held = self._held.get((group, first_rank))
        if held is None or not held.lives():
            self.give_back(group, first_rank)
            held = self._held[group, first_rank] = reserve_when_there_is_room(bundles, name)
        return held.placement

    def give_back(self, group: str, first_rank: int) -> None:
        """Give back what these ranks hold, if anything."""
        held = self._held.pop((group, first_rank), None)
        if held is not None:
            held.give_back()


def require_room(bundles: Sequence[Bundle]) -> None:
    """Raise :class:`CapacityError` where the cluster as a whole has too little free, and still has ``SETTLES_S`` later."""
    import ray

    deadline = time.monotonic() + SETTLES_S
    while True:
        free = ray.available_resources()
        try:
            return require_fit(bundles, {name: float(free.get(name, 0.0)) for name in ("CPU", "GPU")})
        except CapacityError:
            if time.monotonic() > deadline:
                raise
        time.sleep(LOOKS_AGAIN_S)


def on_live_nodes(placement: PlacementGroup, bundles: Iterable[int]) -> bool:
    """Whether each of these bundles of a placement group is on a node that lives."""
    import ray
    from ray.util.placement_group import placement_group_table

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    nodes = placement_group_table(placement)["bundles_to_node_id"]
    return all(nodes.get(bundle) in alive for bundle in bundles)


def reserve(bundles: Sequence[Bundle], name: str, timeout_s: float, *, room_s: float | None = None) -> Reservation:
    """Places for all ``bundles``, or :class:`CapacityError` with the picture of the nodes after ``timeout_s``.

    ``room_s`` is how long to wait for room where there is none, by default as long.
    """
    began = time.monotonic()
    deadline = began + timeout_s
    no_room = deadline if room_s is None else min(deadline, began + room_s)
    # Ray refuses a name that another placement group had until just now, so each attempt has one of its own.
    names = (name if attempt == 0 else f"{name}/again-{attempt}" for attempt in count())
    while True:
        try:
            nodes = free_nodes()
            places = assign(bundles, nodes)
        except CapacityError:
            if time.monotonic() > no_room:
                raise
            time.sleep(min(LOOKS_AGAIN_S, timeout_s))
            continue
        left = max(LOOKS_AGAIN_S, deadline - time.monotonic())
        placement = _placement_group(bundles, [{NODE_LABEL: nodes[place].id} for place in places], next(names))
        if placement.wait(timeout_seconds=min(ATTEMPT_S, left)):
            return Reservation(placement, bundles, picture(bundles, places, nodes))
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(placement)
        if time.monotonic() > deadline:
            raise CapacityError(
                f"Ray did not give {len(bundles)} ranks of {bundles[0].role} and others their places within {timeout_s:g} s "
                f"(cluster.placement_timeout_s), although they were free: start again\n{picture(bundles, places, nodes)}"
            )


def reserve_when_there_is_room(bundles: Sequence[Bundle], name: str) -> Reservation:
    """Places for ``bundles`` of one role that Ray gives when it has them, at once or when a node comes; this waits for nothing.

    They keep to the labels and the resource of the role, and to its strategy among themselves.
    """
    labels = [dict(bundle.labels) for bundle in bundles]
    return Reservation(_placement_group(bundles, labels, name, bundles[0].strategy), bundles, "")


def _placement_group(
    bundles: Sequence[Bundle], labels: Sequence[dict[str, str]], name: str, strategy: str = "pack"
) -> PlacementGroup:
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group

    try:
        group: PlacementGroup = placement_group(
            [_amounts(bundle) for bundle in bundles],
            strategy=strategy.upper(),
            name=name,
            bundle_label_selector=labels if any(labels) else None,
        )
    except RayError as error:
        cause = f"Ray refused the placement group {name}: {error}"
        raise GroupError(bundles[0].role, None, "placement", cause) from error
    return group


def _amounts(bundle: Bundle) -> dict[str, float]:
    amounts = {"CPU": bundle.cpus, "GPU": bundle.gpus}
    if bundle.resource is not None:
        amounts[bundle.resource] = MARK
    return {resource: amount for resource, amount in amounts.items() if amount > 0}
