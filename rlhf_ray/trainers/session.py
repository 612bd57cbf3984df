"""The groups of one run, started where they should live: Ray actors, or plain classes in this process.

Always true: what runs is the same in both places; leaving the ``with`` block leaves no process behind.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.groups import CriticGroup, Group, PolicyGroup, ReferenceGroup, RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks, Ranks
from rlhf_ray.actors.reward_worker import RewardWorker
from rlhf_ray.actors.rollout_worker import RanksHandle, RolloutSetup, RolloutWorker
from rlhf_ray.actors.workers import CriticWorker, PolicyWorker, ReferenceWorker, WorkerSetup
from rlhf_ray.config.preflight import hub_ids
from rlhf_ray.config.schema import ClusterConfig, JobConfig, ResourcesConfig, RoleConfig, RolloutConfig
from rlhf_ray.console import get_logger
from rlhf_ray.pending import Pending
from rlhf_ray.planning.capacity import needed
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.trainers import stopping

AnyGroup = TypeVar("AnyGroup", bound=Group)
WORKERS = {worker.role: worker for worker in (PolicyWorker, CriticWorker, RewardWorker, ReferenceWorker, RolloutWorker)}


class Place(Protocol):
    """Somewhere ranks can live."""

    config: ClusterConfig

    def start(
        self,
        role: str,
        ranks: int,
        resources: ResourcesConfig,
        *,
        first_rank: int = 0,
        name: str | None = None,
    ) -> Ranks:
        """Start the ranks of a role, called ``name`` where there are several groups; their models are not loaded yet."""


class ThisProcess:
    """Plain workers in this process, one rank a role: no Ray."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

    def start(
        self,
        role: str,
        ranks: int,
        resources: ResourcesConfig,
        *,
        first_rank: int = 0,
        name: str | None = None,
    ) -> Ranks:
        return InProcessRanks(name or role, WORKERS[role](first_rank, ranks))


@dataclass(frozen=True)
class Started(Generic[AnyGroup]):
    """A group whose ranks are placed; their processes start while others are placed too."""

    group: AnyGroup
    setup: WorkerSetup
    timeout_s: float

    def load(self) -> Pending[AnyGroup]:
        """Begin to load the models; the value is the group, ready."""
        return self.group.setup(self.setup, timeout_s=self.timeout_s).then(lambda line: self.group)


class Session:
    """Starts the groups that a trainer asks for."""

    def __init__(self, config: JobConfig, *, place: Place | None = None) -> None:
        self.config = config
        self.seed = config.run.seed
        self.cleanup = ExitStack()
        """Ends what groups do not: connections, processes of reward functions."""
        self._cluster: Cluster | None = None
        if place is None:
            self._cluster = Cluster(config.cluster, config.run, needed=needed(config), hub=bool(hub_ids(config)))
        self._place = place

    def __enter__(self) -> Session:
        if self._cluster is not None:
            self._place = self._cluster.__enter__()
            stopping.listen()  # ray.init has taken SIGTERM for itself
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup.close()
        if self._cluster is not None:
            self._cluster.__exit__(kind, error, trace)

    @property
    def place(self) -> Place:
        assert self._place is not None, "a session starts groups inside its with block"
        return self._place

    def policy(self, role: RoleConfig, *, total_updates: int, temperature: float = 1.0) -> Started[PolicyGroup]:
        setup = WorkerSetup(role, self.seed, total_updates=total_updates, temperature=temperature)
        return self._started("policy", PolicyGroup, setup)

    def reference(self, role: RoleConfig, *, temperature: float) -> Started[ReferenceGroup]:
        return self._started("reference", ReferenceGroup, WorkerSetup(role, self.seed, temperature=temperature))

    def critic(self, role: RoleConfig, *, total_updates: int) -> Started[CriticGroup]:
        return self._started("critic", CriticGroup, WorkerSetup(role, self.seed, total_updates=total_updates))

    def reward(
        self,
        role: RoleConfig,
        *,
        total_updates: int | None = None,
        max_tokens: int = 8192,
        max_item_tokens: int = 8192,
        routers: bool = False,
        name: str = "reward",
    ) -> Started[RewardGroup]:
        setup = WorkerSetup(
            role,
            self.seed,
            total_updates=total_updates,
            max_tokens=max_tokens,
            max_item_tokens=max_item_tokens,
            routers=routers,
        )
        return self._started("reward", RewardGroup, setup, name)

    def engines(self, config: RolloutConfig) -> list[Ranks]:
        """All rollout engines, placed; their processes warm up while other groups load."""
        engines = [
            self.place.start("rollout", 1, config.resources, first_rank=number) for number in range(config.engines)
        ]
        for engine in engines:
            engine.call("warm_up", [(config.backend,)])
        return engines

    def fleet(self, engines: list[Ranks], setup: RolloutSetup) -> Fleet:
        """The engines with their model loaded; they serve nothing before the first weight update."""
        timeout_s = self.place.config.start_timeout_s
        for loading in [engine.call("setup", [(setup,)], timeout_s=timeout_s) for engine in engines]:
            get_logger().info("rollout: %s", loading.result()[0])
        return Fleet([RanksHandle(engine) for engine in engines])

    def _started(
        self, role: str, kind: type[AnyGroup], setup: WorkerSetup, name: str | None = None
    ) -> Started[AnyGroup]:
        group = kind(self.place.start(role, setup.config.ranks, setup.config.resources, name=name))
        return Started(group, setup, self.place.config.start_timeout_s)
