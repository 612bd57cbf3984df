"""The gateway actor: owns the reward groups and the web server in front of them.

Always true: groups live and die with the gateway, never with a request or a redeploy; it answers only after the weights
are loaded; a group that died is restarted by its gateway while requests wait; a new version takes over only once it is
loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.errors import GroupError, RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.auth import TokenFile
from rlhf_ray.serving.backend import GroupBackend, with_weights_of
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import Models, ServedModel
from rlhf_ray.serving.scoring import limits_of
from rlhf_ray.serving.server import WebServer
from rlhf_ray.serving.tracing import OpenTelemetryTracer

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup
    from rlhf_ray.actors.place import PlacedGroup

HEALTH_TIMEOUT_S = 60.0
Value = TypeVar("Value")


@ray.remote(num_cpus=0, concurrency_groups={"scoring": 64, "control": 4})
class Gateway:
    """Served reward models."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.cluster = Cluster.for_job(config, namespace=SERVICE_NAMESPACE, check_room=False)
        self.started = 0

    @ray.method(concurrency_group="control")
    def start(self) -> str:
        """Take the port, load the models, answer; returns the address."""
        config = self.config
        self.server = WebServer(config.host, config.port, header_timeout_s=config.header_timeout_s)
        keys = TokenFile(config.token_file)
        tracer = OpenTelemetryTracer() if config.tracing else None
        self.cluster.__enter__()
        metrics = Metrics()
        self.models = Models(
            [ServedModel(name, self._replicas(name, role), limits_of(config), metrics)
             for name, role in config.served.items()]
        )  # fmt: skip
        self.server.start(create_app(self.models, config, metrics, keys, tracer))
        return self.server.address

    def _replicas(self, name: str, role: RoleConfig) -> list[GroupBackend]:
        """All replicas of a model, loaded side by side."""
        placed: list[PlacedGroup[RewardGroup]] = []
        try:
            placed = [self._place(name, role) for _ in range(self.config.replicas)]
            loading = [replica.load() for replica in placed]
            return [self._backend(name, role, pending.result()) for pending in loading]
        except Exception:
            for replica in placed:
                self._stop_group(replica.group)
            raise

    def _backend(self, name: str, role: RoleConfig, group: RewardGroup) -> GroupBackend:
        def again(old: RewardGroup) -> RewardGroup:
            self._stop_group(old)
            replacement = self._place(name, role)
            try:
                return replacement.load().result()
            except Exception:
                self._stop_group(replacement.group)
                raise

        return GroupBackend(group, role.model, normalize=self.config.normalize, again=again, stop=self._stop_group)

    def _place(self, name: str, role: RoleConfig) -> PlacedGroup[RewardGroup]:
        from rlhf_ray.actors.place import place_scoring_group

        self.started += 1  # names of actors that end are free only a moment later
        called = name if self.started == 1 else f"{name}-{self.started}"
        return place_scoring_group(self.cluster, self.config, role, name=called)

    def _stop_group(self, group: RewardGroup) -> None:
        self.cluster.stop(group.ranks)

    @ray.method(concurrency_group="scoring")
    def score(self, requests: Sequence[ScoreRequest], model: str | None = None) -> list[ScoreResult]:
        """Scores for a job of the same cluster: before those that come over HTTP."""
        version = self._named(model).current
        return self._in_loop(version.batcher.score(requests, caller="cluster", urgent=True))

    @ray.method(concurrency_group="scoring")
    def describe(self, model: str | None = None) -> Mapping[str, Any]:
        """What is served under a name."""
        return self._named(model).describe()

    @ray.method(concurrency_group="control")
    def reload(self, path: str, model: str | None = None, revision: str | None = None) -> str:
        """Load ``path`` beside what is served, and let it take over; returns the new version."""
        served = self._named(model)
        role = self.config.served[served.name]
        new = role.model_copy(update={"model": with_weights_of(role.model, path, revision)})
        replicas = self._replicas(served.name, new)

        async def replace() -> None:
            await asyncio.shield(served.replace(replicas))

        self._in_loop(replace())
        return served.current.name

    @ray.method(concurrency_group="control")
    def check(self) -> str:
        """The first group's report, after all were seen alive; restarts one that is not."""
        lines = [self._check(model, backend) for model in self.models.all for backend in model.current.backends]
        return lines[0]

    def _check(self, model: ServedModel, backend: Any) -> str:
        group = backend.group
        try:
            group.health(timeout_s=HEALTH_TIMEOUT_S).result()
        except GroupError:
            if backend.group is group and self.config.hold_s > 0:
                deadline = model.clock() + self.config.hold_s
                self._in_loop(model.current.restart(backend, deadline))
        return str(backend.group.report_line)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Finish what is being answered, then stop the reward groups."""
        self.server.stop()
        self.cluster.__exit__(None, None, None)

    def _named(self, model: str | None) -> ServedModel:
        try:
            return self.models.named(model)
        except RequestError as error:
            raise RequestError(str(error)) from None

    def _in_loop(self, work: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self.server.loop).result()
