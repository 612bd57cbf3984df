"""Roles with several ranks whose ranks share GPUs with those of other roles.

Invariant: rank i of each such role, and rollout engine i, lies on GPU i of those that they share. So no two ranks of one role
are on the same GPU, where NCCL refuses the second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rlhf_ray.config.facts import Placement
from rlhf_ray.config.problems import Problem

EXACT = 10_000
"""Ray counts in ten-thousandths of a GPU."""


@dataclass(frozen=True)
class SharedGpus:
    """Whole GPUs that the ranks of several roles share."""

    roles: tuple[str, ...]
    count: int
    cpus: float
    """Of all roles on one GPU."""


def shared_gpus(placements: Iterable[Placement]) -> SharedGpus | None:
    """The GPUs that roles with several ranks share; None where fewer than two roles would share them."""
    sharing = _sharing(placements)
    if len(sharing) < 2:
        return None
    cpus = sum(placed.resources.cpus_per_rank for placed in sharing)
    return SharedGpus(tuple(placed.name for placed in sharing), max(placed.count for placed in sharing), cpus)


def ranks_have_gpus_of_their_own(placements: Iterable[Placement]) -> Iterator[Problem]:
    """A GPU holds one rank of each role that shares it, and no more of them than it has room for."""
    sharing = _sharing(placements)
    parts = sum(round(placed.resources.gpus_per_rank * EXACT) for placed in sharing)
    if len(sharing) > 1 and parts > EXACT:
        named = " + ".join(f"{placed.name} {placed.resources.gpus_per_rank:g}" for placed in sharing)
        yield (
            f"{sharing[0].name}.resources.gpus_per_rank",
            f"the ranks of several roles share each GPU, and {named} is {parts / EXACT:g} of one: lower them to 1 in all, or "
            "set those of a role to 1, which takes GPUs of its own",
        )


def _sharing(placements: Iterable[Placement]) -> list[Placement]:
    return [placed for placed in placements if placed.count > 1 and 0 < placed.resources.gpus_per_rank < 1]
