"""The workers as Ray actors: the same methods, each rank in a process of its own.

Invariant: an actor adds to its worker only a name, the address of its node, a limit to its share of a GPU, a lane of its own
for health checks, so that a rank inside a collective still answers, another to wait in for files that a thread writes, its
stacks for whoever looks for what hangs, Ray's object store for buckets of weights, the spans of the calls that carry a
context, and a thread that measures it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import ray
import torch

from rlhf_ray.actors.connection import job_mark
from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.imports import quick_imports
from rlhf_ray.models.devices import gpu_memory, limit_memory
from rlhf_ray.monitoring.memory import TreeMemory
from rlhf_ray.monitoring.ranks.busy import BusyTime, count_calls
from rlhf_ray.monitoring.ranks.meter import RankMeter
from rlhf_ray.monitoring.ray_export import RayExporter
from rlhf_ray.processes import spans, stacks
from rlhf_ray.processes.recorded import record_calls

with quick_imports():
    from rlhf_ray.actors.workers.critic import CriticWorker
    from rlhf_ray.actors.workers.encoder import EncoderRewardWorker
    from rlhf_ray.actors.workers.model import ModelWorker
    from rlhf_ray.actors.workers.policy import PolicyWorker, ReferenceWorker
    from rlhf_ray.actors.workers.registry import WorkerKind
    from rlhf_ray.actors.workers.reward import RewardWorker, VllmRewardWorker
    from rlhf_ray.actors.workers.rollout import RolloutWorker
    from rlhf_ray.actors.workers.trained_reward import TrainedRewardWorker
    from rlhf_ray.engine.saving.writer import Written
    from rlhf_ray.rollout.wire import Bucket, PublishedWeights

HEALTH_LANE, SAVING_LANE = "health", "saving"
_beside: set[str] = set()
"""Methods in lanes of their own: while one of them runs, the rank may wait."""
Method = TypeVar("Method", bound=Callable[..., Any])


def _in_lane(lane: str) -> Callable[[Method], Method]:
    """Let Ray run a method beside whatever the actor does in other lanes."""

    def mark(method: Method) -> Method:
        _beside.add(method.__name__)
        return cast(Method, ray.method(concurrency_group=lane)(method))

    return mark


class RankShell(Worker):
    """What Ray adds to a worker."""

    def __init__(self, rank: int = 0, world_size: int = 1, tells_ray: bool = False) -> None:
        """With ``tells_ray`` the rank sends metrics of its own to Ray."""
        # First, so that one which hangs, or is stopped, while it imports what it needs is found out.
        stacks.offer(f"{ray.get_runtime_context().get_actor_name() or f'{self.role}/{rank}'} {job_mark()}")
        self.busy = BusyTime()
        super().__init__(rank, world_size)
        self._meter = RankMeter(self.busy, gpu_memory, self._exporter if tells_ray else None).start()

    def _exporter(self) -> RayExporter:
        """What sends metrics under the name of the run, of the group and of the rank, which the name of the actor has."""
        _, run, role, rank, *_ = (ray.get_runtime_context().get_actor_name() or "").split("/")
        return RayExporter(run, role, int(rank))

    def __repr__(self) -> str:
        """What Ray calls it in logs, errors and its dashboard: the group and the rank, without the run."""
        _, _, shown = (ray.get_runtime_context().get_actor_name() or "").partition("/")
        return shown.partition("/")[2] or f"{self.role}/{self.rank}"

    @_in_lane(HEALTH_LANE)
    def health(self) -> dict[str, Any]:
        return super().health()

    @_in_lane(HEALTH_LANE)
    def stacks(self) -> str:
        """What every thread of this process does, for a driver on another node."""
        return stacks.describe([os.getpid()])

    @_in_lane(HEALTH_LANE)
    def memory(self) -> TreeMemory | None:
        """What this process and those that it started hold; None before that was first measured."""
        return self._meter.held

    def take_device(self, resources: ResourcesConfig) -> torch.device:
        """The device that this rank was placed on. Of a GPU that it shares it gets its share of the memory, not more."""
        device = super().take_device(resources)
        limit_memory(device, resources.gpus_per_rank)
        return device

    def node_address(self) -> str:
        return str(ray.util.get_node_ip_address())


class TrainedShell(RankShell, ModelWorker[Any]):
    """What Ray adds to a worker that trains."""

    @_in_lane(SAVING_LANE)
    def saved(self) -> Written:
        return super().saved()


class PolicyModelActor(TrainedShell, PolicyWorker):
    """One rank of the policy."""

    def call_engines(self, engines: Sequence[Any], method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call the engines' actors side by side; the first error of one of them ends the call."""
        context = spans.carried(spans.sending(RolloutActor.role, method))
        waiting = [
            getattr(engine, method).remote(*own, **context) for engine, own in zip(engines, arguments, strict=True)
        ]
        while waiting:
            (answered, *_), waiting = ray.wait(waiting)
            try:
                ray.get(answered)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

    def keep_bucket(self, bucket: Bucket) -> Any:
        """Copy a bucket into the object store, and nothing else: weights go there straight from the model."""
        return ray.put(bucket)


class ReferenceModelActor(RankShell, ReferenceWorker):
    """One rank of the frozen reference policy."""


class CriticModelActor(TrainedShell, CriticWorker):
    """One rank of the critic."""


class RewardModelActor(RankShell, RewardWorker):
    """One rank of a reward model that scores, for PPO and as a scoring backend."""


class TrainedRewardModelActor(TrainedShell, TrainedRewardWorker):
    """One rank of a reward model in training."""


class VllmRewardModelActor(RankShell, VllmRewardWorker):
    """A reward model that vLLM runs."""


class EncoderRewardModelActor(RankShell, EncoderRewardWorker):
    """One rank of a reward model that is an encoder."""


class RolloutActor(RankShell, RolloutWorker):
    """One rollout engine."""

    def fetch(self, weights: PublishedWeights) -> PublishedWeights:
        """Read one bucket after the other from the object store when it is loaded."""
        return weights.with_buckets(_fetched)


def _fetched(buckets: Iterable[Any]) -> Iterator[Any]:
    handles = list(buckets)
    if handles:
        ray.wait(handles, num_returns=len(handles), timeout=0)  # those on another node start to come now
    return map(ray.get, handles)


ACTORS: Mapping[WorkerKind, type[RankShell]] = {
    "policy": PolicyModelActor,
    "reference": ReferenceModelActor,
    "critic": CriticModelActor,
    "reward": RewardModelActor,
    "trained_reward": TrainedRewardModelActor,
    "vllm_reward": VllmRewardModelActor,
    "encoder_reward": EncoderRewardModelActor,
    "rollout": RolloutActor,
}
for _actor in ACTORS.values():
    count_calls(_actor, _beside)
    record_calls(_actor)


def remote_class(worker: WorkerKind) -> Any:
    """The Ray actor class of a worker."""
    remote: Callable[..., Any] = ray.remote  # its types do not know concurrency_groups
    return remote(concurrency_groups={HEALTH_LANE: 1, SAVING_LANE: 1})(ACTORS[worker])
