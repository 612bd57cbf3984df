"""The reward models of a PPO run, served at a port of its driver while the run trains.

Invariants: the reward groups belong to the run, whose own scores wait for one batch of others at most. A group that dies is
started again once, by the run or by the service, whoever notices first; the port stays open meanwhile, and requests wait for
``expose.hold_s``. What fails for callers ends no group that lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.console import get_logger
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.service import ScoringService

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup


def expose(
    groups: Mapping[str, RewardGroup],
    roles: Mapping[str, RoleConfig],
    config: ServiceConfig,
    cleanup: ExitStack,
    *,
    restarts: bool = True,
) -> str:
    """Answer at a port until ``cleanup`` ends; returns the address. Requests call a model by its section or its path.

    Without ``restarts`` a group that fails ends the run, and nobody waits for it.
    """
    service = ScoringService(config if restarts else config.model_copy(update={"hold_s": 0.0}))
    cleanup.callback(service.stop)
    address = service.start(
        {
            section.removeprefix("reward.mixture."): [
                GroupBackend(
                    group,
                    roles[section].model,
                    normalize=config.normalize,
                    start_again=bring_back if restarts else None,
                )
            ]
            for section, group in groups.items()
        }
    )
    see = "/" if config.page else "/docs"
    get_logger("serving").info("the reward of this run answers at %s, see %s%s", address, address, see)
    return address


def bring_back(group: RewardGroup) -> RewardGroup:
    """Start a group again that has died; one that lives stays, also where the run has started it again meanwhile.

    The run itself may keep a group busy for longer than anybody wants to wait. One that hangs is the watchdog's affair.
    """
    with group.restarting:
        if not group.lives():
            group.restart()
            group.setup_again().result()
    return group
