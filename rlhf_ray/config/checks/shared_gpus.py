"""Roles with several ranks whose ranks share GPUs with those of other roles.

Invariant: rank i of each such role, and rollout engine i, lies on GPU i of those that they share. So no two ranks of one role
are on the same GPU, where NCCL refuses the second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rlhf_ray.config.facts import Placement, Role
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.engine import PlacementConfig

EXACT = 10_000
"""Ray counts in ten-thousandths of a GPU."""


@dataclass(frozen=True)
class SharedGpus:
    """Whole GPUs that the ranks of several roles share."""

    roles: tuple[str, ...]
    count: int
    cpus: float
    """Of all roles on one GPU."""
    shares: tuple[float, ...] = ()
    """What each role takes of a GPU."""
    placements: tuple[PlacementConfig, ...] = ()
    """On which nodes each role is to go."""

    @property
    def name(self) -> str:
        """What messages call the ranks of all these roles on one GPU."""
        return " + ".join(self.roles)


def shared_gpus(placements: Iterable[Placement]) -> SharedGpus | None:
    """The GPUs that roles with several ranks share; None where fewer than two roles would share them."""
    sharing = [placed for placed in placements if placed.count > 1 and 0 < placed.resources.gpus_per_rank < 1]
    if len(sharing) < 2:
        return None
    return SharedGpus(
        tuple(placed.name for placed in sharing),
        max(placed.count for placed in sharing),
        sum(placed.resources.cpus_per_rank for placed in sharing),
        tuple(placed.resources.gpus_per_rank for placed in sharing),
        tuple(placed.placement for placed in sharing),
    )


def colocated_gpus(placements: Iterable[Placement]) -> SharedGpus | None:
    """The GPUs that all roles share by turns, whose shares say nothing of memory (``cluster.colocate``)."""
    sharing = [placed for placed in placements if placed.resources.gpus_per_rank > 0]
    if not sharing:
        return None
    return SharedGpus(
        tuple(placed.name for placed in sharing),
        max(placed.count for placed in sharing),
        sum(placed.resources.cpus_per_rank for placed in sharing),
        (share_of_each(len(sharing)),) * len(sharing),
        tuple(placed.placement for placed in sharing),
    )


def share_of_each(roles: int) -> float:
    """What Ray counts each of so many roles as of a GPU that they share by turns."""
    return EXACT // roles / EXACT


def ranks_have_gpus_of_their_own(roles: Mapping[str, Role], shared: SharedGpus | None) -> Iterator[Problem]:
    """A GPU holds one rank of each role that shares it, and no more of them than it has room for."""
    if shared is not None and sum(round(share * EXACT) for share in shared.shares) > EXACT:
        named = " + ".join(f"{role} {share:g}" for role, share in zip(shared.roles, shared.shares, strict=True))
        yield (
            f"{shared.roles[0]}.resources.gpus_per_rank",
            f"the ranks of several roles share each GPU, and {named} is {sum(shared.shares):g} of one: lower them to 1 in all, "
            "or set those of a role to 1, which takes GPUs of its own",
        )
    if shared is not None:
        yield from _go_to_the_same_nodes(shared)
    for key, role in roles.items():
        gpus, ranks = role.config.resources.gpus_per_rank, role.config.ranks
        alone = shared is None or key not in shared.roles
        # Ray puts ranks that take half a GPU or less on the same one, where NCCL refuses the second rank of a group.
        if alone and 0 < gpus <= 0.5 and ranks > 1 and not role.derived:
            yield (
                f"{key}.resources.gpus_per_rank",
                f"{gpus:g} for each of {ranks} ranks, but two ranks of one role cannot share a GPU: set it to 1 (or anything "
                f"above 0.5), which takes {ranks} GPUs, or {key}.ranks to 1",
            )


def _go_to_the_same_nodes(shared: SharedGpus) -> Iterator[Problem]:
    for key, placement in zip(shared.roles, shared.placements, strict=True):
        if placement != shared.placements[0]:
            yield (
                f"{key}.placement",
                f"it differs from that of {shared.roles[0]}, but the ranks of both lie on the same GPUs: write the same for "
                "both, or set resources.gpus_per_rank of one to 1, which takes GPUs of its own",
            )
