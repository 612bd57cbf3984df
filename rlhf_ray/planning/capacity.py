"""What a job needs of a cluster, and whether the cluster has it.

Invariants: a job is refused here only when no placement of it can exist; the message holds a table of what every role
needs and what is free. Sums are exact in Ray's own unit, a ten-thousandth of a CPU or GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.sections.engine import PlacementConfig, Strategy
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.console import table
from rlhf_ray.errors import CapacityError
from rlhf_ray.network import cluster_address
from rlhf_ray.planning.gpus import count_gpus
from rlhf_ray.planning.processors import processors

UNIT = 10_000
Free = Mapping[str, float] | Sequence[Mapping[str, float]]
"""Free resources: a list of nodes, or the sum over a cluster whose nodes are not known."""


@dataclass(frozen=True)
class Bundle:
    """What one rank of a role (or one rollout engine) takes from one node."""

    role: str
    cpus: float
    gpus: float = 0.0
    strategy: Strategy = "pack"
    labels: tuple[tuple[str, str], ...] = ()
    """Names and values that its node must have."""
    resource: str | None = None
    """A custom resource that its node must have."""


def needed(config: Job) -> list[Bundle]:
    """One bundle for every rank and every rollout engine of the job, role by role; ranks that share a GPU are one."""
    placements, shared = config.placements(), config.shared_gpus()
    alone = [placed for placed in placements if shared is None or placed.name not in shared.roles]
    bundles = []
    if shared is not None:
        place = next(placed.placement for placed in placements if placed.name in shared.roles)
        bundles = [bundle_of(shared.name, shared.cpus, 1.0, place)] * shared.count
    return bundles + [
        bundle_of(placed.name, placed.resources.cpus_per_rank, placed.resources.gpus_per_rank, placed.placement)
        for placed in alone
        for _ in range(placed.count)
    ]


def bundle_of(role: str, cpus: float, gpus: float, placement: PlacementConfig) -> Bundle:
    """What a rank takes, on the nodes that its section ``placement`` asks for."""
    return Bundle(role, cpus, gpus, placement.strategy, tuple(sorted(placement.labels.items())), placement.resource)


def offered_here(cluster: ClusterConfig) -> dict[str, float] | None:
    """What Ray will offer if the job starts it on this machine; none if the job joins a running cluster."""
    if cluster_address(cluster.address) is not None:
        return None
    return {"CPU": float(cluster.num_cpus or processors()), "GPU": float(count_gpus())}


def require_fit(bundles: Sequence[Bundle], free: Free) -> None:
    """Raise :class:`CapacityError`, with a table of what is needed and free, if ``bundles`` cannot all be placed."""
    shortages = list(_shortages(bundles, _nodes(free)))
    if shortages:
        raise CapacityError(f"the job does not fit: {'; '.join(shortages)}\n{capacity_table(bundles, free)}")


def fits(bundles: Sequence[Bundle], free: Free) -> bool:
    """Whether ``require_fit`` accepts ``bundles``."""
    return not any(True for _ in _shortages(bundles, _nodes(free)))


def capacity_table(bundles: Sequence[Bundle], free: Free | None = None) -> str:
    """A table of what each role needs, what all need together, and what is free (by node where nodes are known)."""
    rows = [
        (bundle.role, str(count), _number(bundle.cpus), _number(bundle.gpus), *_total([bundle] * count))
        for bundle, count in Counter(bundles).items()
    ]
    rows.append(("needed", str(len(bundles)), "", "", *_total(bundles)))
    nodes = [] if free is None else _nodes(free)
    if len(nodes) > 1:
        alike = Counter(_amounts(node) for node in nodes)
        rows += [(f"free on {count} of the nodes, each", "", "", "", *amounts) for amounts, count in alike.items()]
    if nodes:
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        rows.append(("free", "", "", "", *_amounts(total)))
    return table("resources", ("role", "ranks", "CPU each", "GPU each", "CPU", "GPU"), rows)


def _nodes(free: Free) -> list[Mapping[str, float]]:
    return [free] if isinstance(free, Mapping) else list(free)


def _shortages(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Why no placement can exist: too little in total, or too few nodes with room for the larger bundles."""
    short = False
    for name, amounts in (("CPU", [bundle.cpus for bundle in bundles]), ("GPU", [bundle.gpus for bundle in bundles])):
        need = sum(map(_units, amounts))
        have = sum(_units(node.get(name, 0.0)) for node in nodes)
        if need > have:
            short = True
            yield f"{need / UNIT:g} {name} needed, {have / UNIT:g} free"
    if short:
        return
    for bundle in dict.fromkeys(bundles):
        count = sum(1 for other in bundles if other.cpus >= bundle.cpus and other.gpus >= bundle.gpus)
        places = sum(_places(bundle, node) for node in nodes)
        if count > places:
            yield (
                f"{count} ranks need {_number(bundle.cpus)} CPU and {_number(bundle.gpus)} GPU on one node each, "
                f"but the nodes have room for {places:g}"
            )


def _places(bundle: Bundle, node: Mapping[str, float]) -> float:
    needs = {"CPU": _units(bundle.cpus), "GPU": _units(bundle.gpus)}
    return min((_units(node.get(name, 0.0)) // need for name, need in needs.items() if need), default=float("inf"))


def _units(amount: float) -> float:
    return float(round(amount * UNIT)) if amount != float("inf") else amount


def _total(bundles: Sequence[Bundle]) -> tuple[str, str]:
    return _number(sum(bundle.cpus for bundle in bundles)), _number(sum(bundle.gpus for bundle in bundles))


def _amounts(free: Mapping[str, float]) -> tuple[str, str]:
    return _number(free.get("CPU", 0.0)), _number(free.get("GPU", 0.0))


def _number(amount: float) -> str:
    return f"{round(amount, 4):g}"
