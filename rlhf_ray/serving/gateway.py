"""The gateway actor: owns the reward group and the web server in front of it.

Always true: the group lives and dies with the gateway, never with a request or a redeploy; the gateway answers only after
the weights are loaded; forwards wait in a thread, never in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster
from rlhf_ray.config.schema import ServeConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.server import WebServer

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup

HEALTH_TIMEOUT_S = 60.0


class GroupBackend:
    """A reward group as the app's backend."""

    def __init__(self, group: RewardGroup, config: ServeConfig) -> None:
        model, described = config.reward.model, group.describe().result()
        name = model.path or f"made:{model.make.shape if model.make else ''}"
        self._description = {"model": name, "revision": model.revision, "dtype": model.dtype, **described}
        mean, std = described["mean"], described["std"]
        if config.normalize and mean is None:
            raise RequestError(
                f"normalize is asked for, but the config.json of {name} holds no mean with a std above 0: train the "
                "reward model with this project, write them there, or leave it off"
            )
        self._group = group
        self._normalization = (0.0, 1.0) if mean is None else (mean, std)

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result a request, in order."""
        results = await asyncio.to_thread(lambda: self._group.score(requests).result())
        return [result.normalised(*self._normalization) for result in results]

    def describe(self) -> Mapping[str, Any]:
        """The model: its name and revision, tokenizer fingerprint, normalisation, longest item."""
        return self._description


@ray.remote(num_cpus=0, max_concurrency=4)
class Gateway:
    """One served reward model."""

    def __init__(self, config: ServeConfig, tokens: tuple[str, ...], hub: bool) -> None:
        self.config = config
        self.tokens = tokens
        self.cluster = Cluster(config.cluster, config.run, hub=hub, namespace=SERVICE_NAMESPACE)

    def start(self) -> str:
        """Take the port, load the model, answer; returns the address."""
        from rlhf_ray.actors.groups import RewardGroup
        from rlhf_ray.actors.workers import WorkerSetup

        self.server = WebServer(self.config.host, self.config.port)
        self.cluster.__enter__()
        role = self.config.reward
        self.group = RewardGroup(self.cluster.start("reward", role.ranks, role.resources))
        setup = WorkerSetup(
            role, seed=0, max_tokens=self.config.max_batch_tokens, max_item_tokens=self.config.max_tokens
        )
        self.group.setup(setup, timeout_s=self.config.cluster.start_timeout_s).result()
        self.server.start(create_app(GroupBackend(self.group, self.config), self.config, self.tokens))
        return self.server.address

    def check(self) -> str:
        """The group's report; raises the typed error of a rank that is gone."""
        self.group.health(timeout_s=HEALTH_TIMEOUT_S).result()
        return self.group.report_line

    def stop(self) -> None:
        """Finish what is being answered, then stop the reward group."""
        self.server.stop()
        self.cluster.__exit__(None, None, None)
