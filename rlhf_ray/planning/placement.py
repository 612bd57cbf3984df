"""On which node every rank of a job goes, decided before anything is placed.

Invariants: what is assigned keeps to what each node has free, to the labels and the custom resource that a role asks for, and
to its strategy; a job is refused only where no assignment exists, or where the search gave up, and then the message says which.
GPUs are counted one by one: a rank with a fraction lies on one GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.console import table
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning.capacity import UNIT, Bundle, offered_here, require_fit

MARK = 0.001
"""What a rank takes of the custom resource that its role names, so that a node with 1 of it has room for a thousand."""
TRIES = 50_000
"""Places that are tried before the search gives up; a job that fits is nearly always found without one step back."""
SEARCH_S = 5.0
"""Seconds after which the search gives up, too."""
SHOWN_BY_LABELS = ("node:", "accelerator_type:")
"""How the custom resources begin that Ray itself gives every node; the picture leaves them out."""


@dataclass(frozen=True)
class Node:
    """What a node has free."""

    name: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] | None = field(default_factory=dict)
    """None where they are not known: then it is taken to have every label and every custom resource."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources, by name."""
    id: str = ""
    """Ray's name of the node."""


@dataclass
class _Room:
    """What is left of a node while ranks are assigned, in ten-thousandths."""

    cpus: int
    gpus: list[int]
    """Of each GPU, what is left of it."""
    marks: dict[str, int]
    ranks: Counter[str]
    """How many ranks of each role lie here."""

    def state(self) -> tuple[object, ...]:
        """Two nodes with the same state are as good for every rank, if both are for the same kinds of ranks."""
        return self.cpus, tuple(sorted(self.gpus)), tuple(sorted(self.marks.items())), tuple(sorted(self.ranks.items()))


@dataclass(frozen=True)
class _Place:
    node: int
    gpus: tuple[int, ...]
    """Indices of the GPUs that the rank lies on."""


def node_here(cluster: ClusterConfig) -> Node | None:
    """This machine as a node, where the job starts Ray on it; None where the job joins a cluster."""
    offered = offered_here(cluster)
    return None if offered is None else Node("this machine", offered["CPU"], offered["GPU"])


def assign(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[int]:
    """The index of a node for each of ``bundles``; raises :class:`CapacityError` with the picture of the nodes."""
    require_fit(bundles, [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes])
    for bundle in dict.fromkeys(bundles):
        if not any(_offers(node, bundle) for node in nodes):
            raise CapacityError(f"the job does not fit: no node has {_asked(bundle)}\n{nodes_table(nodes)}")
    search = _Search(bundles, nodes)
    places = search.run()
    if places is not None:
        return places
    stuck, best = search.stuck, search.deepest
    reason = "the cluster has enough in sum, but not in these pieces"
    if search.gave_up is not None:
        reason = f"the search gave up after {search.gave_up}, so that an assignment may exist all the same"
    rank = sum(1 for other in bundles[:stuck] if other.role == bundles[stuck].role)
    raise CapacityError(
        f"the job does not fit: {bundles[stuck].role} rank {rank} ({_asked(bundles[stuck])}) finds no place beside the others; "
        f"{reason}. Change the sizes (cpus_per_rank, gpus_per_rank), placement.strategy or placement.labels of a role, or free "
        f"a node\n{picture(bundles, best, nodes)}"
    )


def show(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[str]:
    """The picture of a job on ``nodes``, or why it does not fit; nothing where no node is known."""
    if not nodes:
        return []
    try:
        return [picture(bundles, assign(bundles, nodes), nodes)]
    except CapacityError as error:
        return [f"on {', '.join(dict.fromkeys(node.name for node in nodes))}: {error}"]


def picture(bundles: Sequence[Bundle], places: Sequence[int | None], nodes: Sequence[Node]) -> str:
    """A table of the nodes: what each has free, the ranks on it, and what they leave; ranks without a place come last."""
    rows = []
    for index, node in enumerate(nodes):
        here = [place == index for place in places]
        mine = [bundle for bundle, is_here in zip(bundles, here, strict=True) if is_here]
        cpus, gpus = sum(bundle.cpus for bundle in mine), sum(bundle.gpus for bundle in mine)
        rows.append(
            (
                node.name,
                _labels(node),
                _of(node.cpus - cpus, node.cpus),
                _of(node.gpus - gpus, node.gpus),
                _ranks(bundles, here),
            )
        )
    missing = [place is None for place in places]
    if any(missing):
        rows.append(("nowhere", "", "", "", _ranks(bundles, missing)))
    return table("placement", ("node", "labels", "CPU left", "GPU left", "ranks"), rows)


def nodes_table(nodes: Sequence[Node]) -> str:
    """The nodes and what each has free."""
    return picture([], [], nodes)


class _Search:
    """A depth-first search for a node of each rank, the ranks with the fewest choices first."""

    def __init__(self, bundles: Sequence[Bundle], nodes: Sequence[Node]) -> None:
        self.bundles, self.nodes = bundles, nodes
        asked = {bundle.resource for bundle in bundles}  # nodes that differ in another are alike
        self.rooms = [
            _Room(
                _units(node.cpus),
                _instances(node.gpus),
                {name: _units(amount) for name, amount in node.resources.items() if name in asked},
                Counter(),
            )
            for node in nodes
        ]
        self.wanted = Counter(bundles)
        self.offers = {bundle: [_offers(node, bundle) for node in nodes] for bundle in self.wanted}
        self.groups = [tuple(offers[index] for offers in self.offers.values()) for index in range(len(nodes))]
        """Which kinds of ranks each node is for: nodes are alike only if these are."""
        self.states = [room.state() for room in self.rooms]
        self.placed: Counter[str] = Counter()
        """How many ranks of each role have a place."""
        self.order = sorted(range(len(bundles)), key=lambda index: _hardness(bundles[index], bundles))
        self.stuck = self.order[0] if bundles else 0
        self.deepest: list[int | None] = [None] * len(bundles)
        """The longest part of an assignment that was found, for the message."""
        self.gave_up: str | None = None
        """What ended the search before every assignment was tried."""

    def run(self) -> list[int] | None:
        chosen: list[_Place] = []
        choices = [self._choices(0)] if self.order else []
        reached, tries, began = -1, 0, time.monotonic()
        while len(chosen) < len(self.order):
            place = next(choices[-1], None)
            if place is None:
                choices.pop()
                if not choices:
                    return None
                self._move(self.order[len(chosen) - 1], chosen.pop(), back=True)
                continue
            tries += 1
            if tries > TRIES or time.monotonic() - began > SEARCH_S:
                self.gave_up = f"{TRIES} tries" if tries > TRIES else f"{SEARCH_S:g} s"
                return None
            self._move(self.order[len(chosen)], place)
            chosen.append(place)
            if len(chosen) < len(self.order):
                choices.append(self._choices(len(chosen)))
            if len(chosen) > reached:
                reached = len(chosen)
                self._remember(chosen)
        nodes = dict(zip(self.order, (place.node for place in chosen), strict=True))
        return [nodes[index] for index in range(len(self.bundles))]

    def _remember(self, chosen: Sequence[_Place]) -> None:
        nodes = dict(zip(self.order, (place.node for place in chosen), strict=False))
        self.deepest = [nodes.get(index) for index in range(len(self.bundles))]
        self.stuck = self.order[min(len(chosen), len(self.order) - 1)]

    def _choices(self, step: int) -> Iterator[_Place]:
        """Places for a rank, the best by its strategy first, and of several that are alike only one."""
        bundle = self.bundles[self.order[step]]
        seen = set()
        possible = [index for index, offers in enumerate(self.offers[bundle]) if offers and self._allows(index, bundle)]
        for index in sorted(possible, key=lambda index: self._preference(index, bundle)):
            room = self.rooms[index]
            for gpus in _gpu_choices(room.gpus, bundle):
                state = (self.states[index], tuple(room.gpus[gpu] for gpu in gpus), self.groups[index])
                if state not in seen:
                    seen.add(state)
                    yield _Place(index, gpus)

    def _allows(self, index: int, bundle: Bundle) -> bool:
        room = self.rooms[index]
        if room.cpus < _units(bundle.cpus):
            return False
        if (
            bundle.resource is not None
            and self.nodes[index].labels is not None
            and room.marks.get(bundle.resource, 0) < _units(MARK)
        ):
            return False
        others = self.placed[bundle.role] - room.ranks[bundle.role]
        if bundle.strategy == "strict_pack":
            return others == 0
        return bundle.strategy != "strict_spread" or room.ranks[bundle.role] == 0

    def _preference(self, index: int, bundle: Bundle) -> tuple[float, ...]:
        room = self.rooms[index]
        free = (sum(room.gpus), room.cpus)
        if bundle.strategy in ("spread", "strict_spread"):
            return room.ranks[bundle.role], -free[0], -free[1], index
        left = self.wanted[bundle] - self.placed[bundle.role]
        lacking = max(0, left - _holds(room, bundle))
        return not room.ranks[bundle.role], lacking, not room.ranks, *free, index

    def _move(self, index: int, place: _Place, *, back: bool = False) -> None:
        bundle, room, sign = self.bundles[index], self.rooms[place.node], 1 if back else -1
        room.cpus += sign * _units(bundle.cpus)
        for gpu in place.gpus:
            room.gpus[gpu] += sign * min(UNIT, _units(bundle.gpus))
        if bundle.resource in room.marks:
            room.marks[bundle.resource] += sign * _units(MARK)
        self.placed[bundle.role] -= sign
        room.ranks[bundle.role] -= sign
        if not room.ranks[bundle.role]:
            del room.ranks[bundle.role]  # so that equal rooms compare equal
        self.states[place.node] = room.state()


def _hardness(bundle: Bundle, bundles: Sequence[Bundle]) -> tuple[float, ...]:
    together = sum(other.cpus for other in bundles if other.role == bundle.role)
    strict = bundle.strategy == "strict_pack"
    return not strict, -together if strict else 0.0, not (bundle.labels or bundle.resource), -bundle.gpus, -bundle.cpus


def _gpu_choices(free: Sequence[int], bundle: Bundle) -> Iterator[tuple[int, ...]]:
    """Which GPUs of a node a rank may lie on: whole ones, or one with room for its fraction, the fullest first."""
    need = _units(bundle.gpus)
    if need >= UNIT:
        whole = [index for index, left in enumerate(free) if left == UNIT]
        count = -(-need // UNIT)
        if len(whole) >= count:
            yield tuple(whole[:count])
    elif need == 0:
        yield ()
    else:
        yield from (
            (index,) for left, index in sorted((left, index) for index, left in enumerate(free)) if left >= need
        )


def _holds(room: _Room, bundle: Bundle) -> int:
    """How many such ranks have room on a node, alone."""
    by_cpu = room.cpus // _units(bundle.cpus) if _units(bundle.cpus) else 10**9
    need = _units(bundle.gpus)
    if not need:
        return by_cpu
    whole = sum(left == UNIT for left in room.gpus)
    by_gpu = whole // -(-need // UNIT) if need >= UNIT else sum(left // need for left in room.gpus)
    return min(by_cpu, by_gpu)


def _offers(node: Node, bundle: Bundle) -> bool:
    """Whether a node has the labels and the custom resource that a rank asks for."""
    if node.labels is None:
        return True
    marked = bundle.resource is None or node.resources.get(bundle.resource, 0.0) >= MARK
    return marked and all(node.labels.get(name) == value for name, value in bundle.labels)


def _asked(bundle: Bundle) -> str:
    asked = [f"{bundle.cpus:g} CPU", f"{bundle.gpus:g} GPU"]
    asked += [f"label {name}={value}" for name, value in bundle.labels]
    asked += [f"resource {bundle.resource}"] if bundle.resource is not None else []
    return ", ".join([*asked, f"strategy {bundle.strategy}"])


def _instances(gpus: float) -> list[int]:
    """A node's GPUs one by one; what is free beside whole ones is taken for a part of one GPU."""
    whole, part = divmod(_units(gpus), UNIT)
    return [UNIT] * whole + ([part] if part else [])


def _units(amount: float) -> int:
    return round(min(amount, 1e9) * UNIT)


def _labels(node: Node) -> str:
    own = [f"{name}={value}" for name, value in (node.labels or {}).items() if not name.startswith("ray.io/node-")]
    return ", ".join([*own, *(name for name in node.resources if not name.startswith(SHOWN_BY_LABELS))])


def _of(left: float, free: float) -> str:
    return f"{round(left, 4):g} of {round(free, 4):g}"


def _ranks(bundles: Sequence[Bundle], here: Iterable[bool]) -> str:
    """The ranks of each role among those ``here``, such as ``policy 0-3, rollout 1``."""
    numbers: dict[str, list[int]] = {}
    counted: Counter[str] = Counter()
    for bundle, is_here in zip(bundles, here, strict=True):
        if is_here:
            numbers.setdefault(bundle.role, []).append(counted[bundle.role])
        counted[bundle.role] += 1
    return ", ".join(f"{role} {_runs(ranks)}" for role, ranks in numbers.items())


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
