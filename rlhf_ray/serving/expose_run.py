"""The reward models of a run that trains, behind a port of its driver.

Always true: the groups belong to the run, which is never held up by more than one batch of others; a group that dies ends
the run, and with it the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.console import get_logger
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.auth import TokenFile, require_closed
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import Models, ServedModel
from rlhf_ray.serving.scoring import limits_of
from rlhf_ray.serving.server import WebServer
from rlhf_ray.serving.tracing import OpenTelemetryTracer

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup


def expose(
    groups: Mapping[str, RewardGroup], roles: Mapping[str, RoleConfig], config: ServiceConfig, cleanup: ExitStack
) -> str:
    """Answer at a port until ``cleanup`` ends; returns the address. Requests call a model by its section or path."""
    keys = TokenFile(config.token_file)
    require_closed(config.host, keys())
    config = config.model_copy(update={"hold_s": 0.0})  # nobody here can bring a group back
    server = WebServer(config.host, config.port, header_timeout_s=config.header_timeout_s)
    cleanup.callback(server.stop)
    metrics = Metrics()
    models = Models(
        [
            ServedModel(
                name.removeprefix("reward.mixture."),
                [GroupBackend(group, roles[name].model, normalize=config.normalize)],
                limits_of(config),
                metrics,
            )
            for name, group in groups.items()
        ]
    )
    server.start(create_app(models, config, metrics, keys, OpenTelemetryTracer() if config.tracing else None))
    get_logger("serving").info("the reward of this run answers at %s, see %s/docs", server.address, server.address)
    return server.address
