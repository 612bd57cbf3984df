"""The Ray actor behind ``rlhf-ray serve``: it owns the reward groups and the web server in front of them.

Invariants: groups live and die with the gateway, never with a request; it answers only after the weights are loaded; a
group that died or hangs is restarted by its gateway while requests wait, again and again, and no failure of a group ends the
gateway; a new version takes over only once it is loaded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import ray

from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.encoding import longest_read
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.backend import GroupBackend, with_weights_of
from rlhf_ray.serving.models import ModelVersion, ServedModel
from rlhf_ray.serving.service import ScoringService

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup
    from rlhf_ray.actors.place import PlacedGroup

SECONDS_BETWEEN_CHECKS = 5.0
HEALTH_TIMEOUT_S = 30.0
"""A rank whose process says nothing for so long hangs; it says something while it computes, too."""
ACTOR_OPTIONS: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {"scoring": 64, "control": 4}}
"""Scores and control have threads of their own, so that a reload, which takes minutes, holds up no score."""
Value = TypeVar("Value")


class Gateway:
    """Reward models of one service, at one port."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.cluster = Cluster.for_job(config, namespace=SERVICE_NAMESPACE, together=True)
        self.groups_started = 0
        self._stopping = threading.Event()

    @ray.method(concurrency_group="control")
    def start(self) -> str:
        """Take the port, load the models, answer; returns the address."""
        self.service = ScoringService(self.config)
        self.cluster.__enter__()
        address = self.service.start({name: self._replicas(name, role) for name, role in self.config.served.items()})
        threading.Thread(target=self._keep_checking, name="group checks", daemon=True).start()
        return address

    def _keep_checking(self) -> None:
        while not self._stopping.wait(SECONDS_BETWEEN_CHECKS):
            try:
                self.check()
            except Exception as error:  # the next one may succeed
                get_logger("serving").error("the groups cannot be checked: %r", error)

    @ray.method(concurrency_group="control")
    def alive(self) -> ServeConfig:
        """What is served now, reloads included; a gateway whose process died does not answer."""
        return self.config

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
        def start_again(failed: RewardGroup) -> RewardGroup:
            self._stop_failed(failed)
            replacement = self._place(name, role)
            try:
                return replacement.load().result()
            except Exception:
                self._stop_group(replacement.group)
                raise

        return GroupBackend(
            group, role.model, normalize=self.config.normalize, start_again=start_again, stop=self._stop_group
        )

    def _stop_failed(self, group: RewardGroup) -> None:
        """Stop what is left of a group; a failure to do so must not keep another group from taking its place."""
        try:
            self._stop_group(group)
        except Exception as error:
            get_logger("serving").warning("what is left of %s cannot be stopped: %r", group.role, error)

    def _place(self, name: str, role: RoleConfig) -> PlacedGroup[RewardGroup]:
        from rlhf_ray.actors.place import place_scoring_group

        self.groups_started += 1  # the names of actors that end are free only a moment later
        group_name = name if self.groups_started == 1 else f"{name}-{self.groups_started}"
        limit = longest_read(self.config.max_tokens)
        return place_scoring_group(self.cluster, self.config, role, name=group_name, places=name, max_item_bytes=limit)

    def _stop_group(self, group: RewardGroup) -> None:
        assert isinstance(group.ranks, RayRanks), "the cluster started them"
        self.cluster.stop(group.ranks)

    @ray.method(concurrency_group="scoring")
    def score(self, requests: Sequence[ScoreRequest], model: str | None = None) -> list[ScoreResult]:
        """Scores for a job of the same cluster, before those that come over HTTP."""
        version = self._named(model).current
        return self._in_loop(version.score(requests, caller="cluster", urgent=True))

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
        self.config = self.config.serving(served.name, new)
        return served.current.name

    def check(self) -> None:
        """Ask every group that should be up whether it is, and begin to restart one that is not; never raises."""
        asked = [
            (model.current, backend, backend.group, _begin(backend.group))
            for model in self.service.catalog.models
            for backend in model.current.backends
            if isinstance(backend, GroupBackend) and not model.current.is_down(backend)
        ]
        for version, backend, group, health in asked:
            try:
                health.result()
            except Exception as error:
                get_logger("serving").error("%s: %s", version.model, error)
                self._in_loop(self._recover(version, backend, group))

    async def _recover(self, version: ModelVersion, backend: GroupBackend, group: RewardGroup) -> None:
        if backend.group is group and not version.is_down(backend):  # else it has been restarted meanwhile
            version.recover(backend)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Finish what is being answered, then stop the reward groups."""
        self._stopping.set()
        self.service.stop()
        self.cluster.__exit__(None, None, None)

    def _named(self, model: str | None) -> ServedModel:
        try:
            return self.service.catalog.named(model)
        except RequestError as error:
            raise RequestError(str(error)) from None  # a refusal of the HTTP interface means nothing to a caller in Ray

    def _in_loop(self, work: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self.service.server.loop).result()


def _begin(group: RewardGroup) -> Pending[Any]:
    """Ask a group whether it is up; an error of asking is an error of the answer."""
    try:
        return group.health(timeout_s=HEALTH_TIMEOUT_S)
    except Exception as error:
        failure = error

    def fail() -> NoReturn:
        raise failure

    return Pending(fail)


GatewayActor: Any = ray.remote(**ACTOR_OPTIONS)(Gateway)
"""The class as an actor: the types of Ray know neither concurrency groups nor the methods of an actor class."""
