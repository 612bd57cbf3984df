"""The reward models of a PPO run, served at a port of its driver while the run trains.

Invariants: the reward groups belong to the run, whose own scores wait for one batch of others at most; a group that dies
ends the run, and the service with it.
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
    groups: Mapping[str, RewardGroup], roles: Mapping[str, RoleConfig], config: ServiceConfig, cleanup: ExitStack
) -> str:
    """Answer at a port until ``cleanup`` ends; returns the address. Requests call a model by its section or its path."""
    service = ScoringService(config.model_copy(update={"hold_s": 0.0}))  # nobody here can bring a group back
    cleanup.callback(service.stop)
    address = service.start(
        {
            section.removeprefix("reward.mixture."): [
                GroupBackend(group, roles[section].model, normalize=config.normalize)
            ]
            for section, group in groups.items()
        }
    )
    get_logger("serving").info("the reward of this run answers at %s, see %s/docs", address, address)
    return address
