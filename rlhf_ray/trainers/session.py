"""Start the groups of ranks that a training run needs, on a Ray cluster or in this process.

Invariants: the same code runs in both places. Leaving the ``with`` block ends every process that the session started. A run
remembers the cluster that it joined, and no rank writes before its node is known to see the run directory.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from rlhf_ray.actors.answers import MemoryOfRanks
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.connection import job_mark
from rlhf_ray.actors.engines import load_fleet, place_engines
from rlhf_ray.actors.groups import CriticGroup, PolicyGroup, ReferenceGroup, RewardGroup, TrainedRewardGroup
from rlhf_ray.actors.loading import Load
from rlhf_ray.actors.place import Place, PlacedGroup, place_group, place_reward_group
from rlhf_ray.actors.ranks import Ranks, RayRanks
from rlhf_ray.actors.turns import SharedPlace
from rlhf_ray.actors.workers.model import WorkerSetup
from rlhf_ray.actors.workers.policy import LanguageSetup
from rlhf_ray.actors.workers.reward import RewardSetup
from rlhf_ray.actors.workers.rollout import RolloutSetup
from rlhf_ray.actors.workers.trained_reward import TrainedRewardSetup
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.memory import TreeMemory
from rlhf_ray.rewards.encoding import longest_read
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.runs import clusters
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.shared import SharedFile


class Session:
    """Starts the groups of one run. Without ``place`` the session joins or starts the Ray cluster of the config."""

    def __init__(self, config: TrainingJob, run: RunDirectory, *, place: Place | None = None) -> None:
        self.config = config
        self._run = run
        self.seed = config.run.seed
        self._longest = config.longest_sequence()
        self.cleanup = ExitStack()
        """Closes what no group owns: connections, and the processes of reward functions."""
        self._cluster: Cluster | None = None
        if place is None:
            self._cluster = Cluster.for_job(config, together=True)
        self._place = place
        self._memory = MemoryOfRanks()

    def __enter__(self) -> Session:
        if self._cluster is not None:
            self._place = self._on_shared_gpus(self._cluster.__enter__())
            clusters.remember(self._run, self._cluster.joined)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.cleanup.close()
        except Exception as cleanup_error:  # a user's own close; what the run has done is on disk
            get_logger().warning("closing what the run had opened failed: %r", cleanup_error)
        if self._cluster is not None:
            self._cluster.__exit__(kind, error, trace)

    def _on_shared_gpus(self, place: Place) -> Place:
        """``place``, where all roles take turns on the same GPUs if the config says so."""
        shared = self.config.shared_gpus() if self.config.cluster.colocate else None
        return place if shared is None else SharedPlace(place, shared.shares[0])

    def _whole(self, role: RoleConfig) -> RoleConfig:
        """``role`` as it may use its GPU: all of its memory, where roles take turns."""
        resources = role.resources
        if not (self.config.cluster.colocate and 0 < resources.gpus_per_rank < 1):
            return role
        return role.model_copy(update={"resources": resources.model_copy(update={"gpus_per_rank": 1.0})})

    @property
    def in_other_processes(self) -> bool:
        """Whether ranks live on a cluster, and not in this process."""
        return self._cluster is not None

    @property
    def place(self) -> Place:
        """Where ranks live; there is none before the ``with`` block."""
        assert self._place is not None, "a session starts groups inside its with block"
        return self._place

    @property
    def watched(self) -> tuple[RayRanks, ...] | None:
        """All groups whose ranks are processes of their own; None where they are in this one."""
        return None if self._cluster is None else self._cluster.groups

    def memory_of_ranks(self, wait_s: float) -> list[TreeMemory]:
        """What ranks hold, as each said last, asked for at most ``wait_s``; nothing where all descend from this process."""
        if self._cluster is None or self._cluster.has_own_ray:
            return []
        return self._memory.ask([actor for group in self._cluster.groups for actor in group.actors], wait_s)

    @property
    def mark(self) -> str:
        """With what the labels of the run's own processes end (``processes/stacks.py``); empty where it has none."""
        return "" if self._cluster is None else job_mark()

    @property
    def _shared(self) -> SharedFile:
        return SharedFile.at(self._run.attempts.path)

    def policy(
        self, role: RoleConfig, *, total_updates: int, temperature: float = 1.0, teacher: ModelConfig | None = None
    ) -> PlacedGroup[PolicyGroup]:
        """Place a policy that learns for ``total_updates`` updates; ``temperature`` is that of its log-probs.

        A ``teacher`` lies beside it on every rank.
        """
        setup = LanguageSetup(
            self._whole(role),
            self.seed,
            total_updates=total_updates,
            temperature=temperature,
            teacher=teacher,
            shared=self._shared,
            longest=self._longest,
        )
        return place_group(self.place, "policy", PolicyGroup, setup)

    def reference(self, role: RoleConfig, *, temperature: float) -> PlacedGroup[ReferenceGroup]:
        """Place the frozen model that the policy's KL is measured from."""
        setup = LanguageSetup(self._whole(role), self.seed, temperature=temperature, longest=self._longest)
        return place_group(self.place, "reference", ReferenceGroup, setup)

    def critic(self, role: RoleConfig, *, total_updates: int) -> PlacedGroup[CriticGroup]:
        """Place a critic that learns for ``total_updates`` updates."""
        setup = WorkerSetup(
            self._whole(role), self.seed, total_updates=total_updates, shared=self._shared, longest=self._longest
        )
        return place_group(self.place, "critic", CriticGroup, setup)

    def reward(self, role: RoleConfig, *, max_tokens: int, max_item_tokens: int, name: str) -> PlacedGroup[RewardGroup]:
        """Place a reward model that scores; ``max_tokens`` bounds a pack, and ``max_item_tokens`` one item."""
        setup = RewardSetup(
            self._whole(role),
            self.seed,
            max_tokens=max_tokens,
            max_item_tokens=max_item_tokens,
            max_item_bytes=longest_read(max_item_tokens),  # others may call it, at the port of expose
        )
        return place_reward_group(self.place, setup, name=name)

    def trained_reward(self, role: RoleConfig, *, total_updates: int, routers: bool) -> PlacedGroup[TrainedRewardGroup]:
        """Place a reward model that learns; ``routers`` says that the loss reads the routers of experts."""
        setup = TrainedRewardSetup(
            role, self.seed, total_updates=total_updates, routers=routers, shared=self._shared, longest=self._longest
        )
        return place_group(self.place, "trained_reward", TrainedRewardGroup, setup)

    def engines(self, config: RolloutConfig) -> list[Ranks]:
        """Place all rollout engines; their processes import what they need while other groups load."""
        return place_engines(self.place, config)

    def fleet(self, engines: list[Ranks], setup: RolloutSetup, load_all: Load) -> Fleet:
        """Load the model into all engines; they generate nothing before the first weight update."""
        return load_fleet(engines, replace(setup, shared=self._shared), self.place.config.start_timeout_s, load_all)
