"""The gateway actor: owns the reward group and the web server in front of it.

Always true: the group lives and dies with the gateway, never with a request or a redeploy; the gateway answers only after
the weights are loaded; forwards wait in a thread, never in the event loop.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import uvicorn

from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster
from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.workers import WorkerSetup
from rlhf_ray.config.schema import ServeConfig
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.source import ModelSource
from rlhf_ray.serving.app import create_app


class GroupBackend:
    """A reward group as the app's backend."""

    def __init__(self, group: RewardGroup, description: Mapping[str, Any]) -> None:
        self._description = description
        mean, std = description.get("mean"), description.get("std")
        normalised = mean is not None and bool(std)
        self._source = ModelSource(group, mean=float(mean or 0.0), std=float(std)) if normalised else ModelSource(group)

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        return await asyncio.to_thread(lambda: self._source.score(requests, ()).result())

    def describe(self) -> Mapping[str, Any]:
        return self._description


@ray.remote(num_cpus=0, max_concurrency=4)
class Gateway:
    """One served reward model."""

    def __init__(self, config: ServeConfig, tokens: tuple[str, ...], hub: bool) -> None:
        self.config = config
        self.tokens = tokens
        self.cluster = Cluster(config.cluster, config.run, hub=hub, namespace=SERVICE_NAMESPACE)

    def start(self) -> str:
        """Load the model, open the port; returns the address that answers."""
        self.cluster.__enter__()
        role = self.config.reward
        group = RewardGroup(self.cluster.start("reward", role.ranks, role.resources))
        setup = WorkerSetup(
            role, seed=0, max_tokens=self.config.max_batch_tokens, max_item_tokens=self.config.max_tokens
        )
        group.setup(setup, timeout_s=self.config.cluster.start_timeout_s).result()
        model = role.model.path or f"made:{role.model.make.shape if role.model.make else ''}"
        description = {"model": model, **group.describe().result()}
        app = create_app(GroupBackend(group, description), self.config, self.tokens)
        listener = socket.create_server((self.config.host, self.config.port), backlog=2048)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        host, port = listener.getsockname()[:2]
        return f"http://{host}:{port}"

    def stop(self) -> None:
        """Stop the reward group."""
        self.cluster.__exit__(None, None, None)
