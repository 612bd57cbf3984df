"""The groups of one run, started where they should live: Ray actors, or plain classes in this process.

Always true: what runs is the same in both places; leaving the ``with`` block leaves no process behind.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.groups import CriticGroup, PolicyGroup, ReferenceGroup, RewardGroup
from rlhf_ray.actors.place import Place, PlacedGroup, RankSpec, place_group
from rlhf_ray.actors.ranks import Ranks
from rlhf_ray.actors.rollout_worker import RanksHandle, RolloutSetup
from rlhf_ray.actors.workers import WorkerSetup
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.console import get_logger
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.trainers import stopping


class Session:
    """Starts the groups that a trainer asks for."""

    def __init__(self, config: Job, *, place: Place | None = None) -> None:
        self.config = config
        self.seed = config.run.seed
        self.cleanup = ExitStack()
        """Ends what groups do not: connections, processes of reward functions."""
        self._cluster: Cluster | None = None
        if place is None:
            self._cluster = Cluster.for_job(config)
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

    def policy(self, role: RoleConfig, *, total_updates: int, temperature: float = 1.0) -> PlacedGroup[PolicyGroup]:
        setup = WorkerSetup(role, self.seed, total_updates=total_updates, temperature=temperature)
        return place_group(self.place, "policy", PolicyGroup, setup)

    def reference(self, role: RoleConfig, *, temperature: float) -> PlacedGroup[ReferenceGroup]:
        return place_group(
            self.place, "reference", ReferenceGroup, WorkerSetup(role, self.seed, temperature=temperature)
        )

    def critic(self, role: RoleConfig, *, total_updates: int) -> PlacedGroup[CriticGroup]:
        return place_group(self.place, "critic", CriticGroup, WorkerSetup(role, self.seed, total_updates=total_updates))

    def reward(
        self,
        role: RoleConfig,
        *,
        total_updates: int | None = None,
        max_tokens: int = 8192,
        max_item_tokens: int = 8192,
        routers: bool = False,
        name: str = "reward",
    ) -> PlacedGroup[RewardGroup]:
        setup = WorkerSetup(
            role,
            self.seed,
            total_updates=total_updates,
            max_tokens=max_tokens,
            max_item_tokens=max_item_tokens,
            routers=routers,
        )
        return place_group(self.place, "reward", RewardGroup, setup, name=name)

    def engines(self, config: RolloutConfig) -> list[Ranks]:
        """All rollout engines, placed; their processes warm up while other groups load."""
        engines = [
            self.place.start(RankSpec("rollout", 1, config.resources, first_rank=number))
            for number in range(config.engines)
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
