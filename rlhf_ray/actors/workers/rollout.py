"""The worker that runs one rollout engine, and the handle with which the fleet reaches it.

Invariant: a vLLM engine has a process of its own, because vLLM sets the thread count of its whole process.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray import environment
from rlhf_ray.actors.ranks import Ranks
from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.imports import quick_imports
from rlhf_ray.models.devices import placed_device
from rlhf_ray.network import LOOPBACK, variables_at
from rlhf_ray.pending import Pending
from rlhf_ray.planning.colocation.phases import Level
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.execution import Execution, require_agreement
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Probe
from rlhf_ray.rollout.weights.deadline import Taken, UpdateDeadline
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.storage.shared import SharedFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RolloutSetup:
    """What an engine needs to start."""

    config: RolloutConfig
    model_dir: str
    stop_token_ids: tuple[int, ...]
    """Each ends an answer, as its last action."""
    seed: int
    deterministic: bool
    weight_version: int = 0
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """Of all weights by their names on disk, if ``model_dir`` holds none and an update brings them before the first request."""
    takes_turns: bool = False
    """Whether the driver says when it sleeps and wakes, because all roles are on the same GPUs."""
    adapter_rank: int | None = None
    """The largest rank of the adapter that comes with every version; None where LoRA is merged, or nothing is adapted."""
    execution: Execution | None = None
    """How the trainer computes log-probs; the engine refuses to start, and to start again, where it does otherwise."""
    shared: SharedFile | None = None
    """A file by which the engine's node tells whether it sees the run directory, from which the engine starts."""


def make_engine(setup: RolloutSetup, rank: int, device: torch.device) -> RolloutEngine:
    """Start an engine of the configured backend on ``device``."""
    if setup.config.backend == "vllm":
        from rlhf_ray.rollout.vllm_engine import VllmEngine

        engine_class: type[RolloutEngine] = VllmEngine
    else:
        from rlhf_ray.rollout.transformers_engine import TransformersEngine

        engine_class = TransformersEngine
    return engine_class(
        setup.model_dir,
        setup.config,
        stop_token_ids=setup.stop_token_ids,
        rank=rank,
        weight_version=setup.weight_version,
        seed=setup.seed,
        deterministic=setup.deterministic,
        device=device,
        shapes=setup.shapes,
        takes_turns=setup.takes_turns,
        adapter_rank=setup.adapter_rank,
    )


class RolloutWorker(Worker):
    """One engine. Each has a placement of its own: engines fail one by one, not as a group."""

    role = "rollout"

    def warm_up(self, backend: str) -> None:
        """Import what the engine needs, before there is a model to load."""
        imported = {"vllm": "weight_transfer", "transformers": "transformers_engine"}[backend]
        with quick_imports():
            importlib.import_module(f"rlhf_ray.rollout.{imported}")

    def setup(self, setup: RolloutSetup) -> str:
        """Start the engine on the device that it was placed on; returns one line about it.

        Raises :class:`CapacityError` before anything is allocated if that device is not there.
        """
        self.require_shared(setup.shared)
        resources = setup.config.resources
        own_share = setup.config.backend == "vllm"  # it keeps to rollout.gpu_memory_utilization
        device = placed_device(resources, self.role) if own_share else self.take_device(resources)
        alone = (
            setup.config.tensor_parallel == 1 and device.type == "cpu"
        )  # on a GPU it may meet a policy of another node
        environment.prepare(variables_at(LOOPBACK if alone else self.node_address()))
        self.engine = make_engine(setup, self.rank, device)
        if setup.execution is not None:
            here = f"rollout engine {self.rank} at {self.node_address()}"
            require_agreement(self.engine.execution(), setup.execution, "across", here=here, there="the policy")
        self.phase = "ready"
        return (
            f"{setup.config.backend} engine {self.rank}: {setup.config.dtype}, {setup.config.max_model_tokens} tokens"
        )

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> list[Generation]:
        """Generations of ``requests``, in their order."""
        with self.doing("generate"):
            return self.engine.generate(requests, deadline_s)

    def advance(self, requests: Sequence[GenerationRequest], seconds: float) -> list[Generation]:
        """Take on ``requests`` and sample for ``seconds``; the generations that ended, of these or of earlier ones."""
        with self.doing("generate"):
            return self.engine.advance(requests, seconds)

    def receive(self, weights: PublishedWeights) -> tuple[Taken, Execution]:
        """Replace the engine's weights by ``weights``; returns what that took, and how the engine computes log-probs then."""
        with self.doing("receive"):
            wanted, began = self.engine.wanted(weights), time.monotonic()
            self.engine.receive(self.fetch(wanted))
            taken = Taken(wanted.nbytes > 0, wanted.nbytes_in_all, time.monotonic() - began)
            return taken, self.engine.execution()

    def fetch(self, weights: PublishedWeights) -> PublishedWeights:
        """The publication with its buckets in the place of their handles: they are here in the same process."""
        return weights

    def execution(self) -> Execution:
        """How the engine computes log-probs."""
        return self.engine.execution()

    def gpus(self) -> list[str]:
        """The GPUs on which weights can come from the trainer."""
        return self.engine.gpus()

    def connect(self, transport: str, info: dict[str, Any]) -> None:
        """Join the group in which the trainer sends weights; this and what follows is called by the trainer's rank 0."""
        with self.doing("connect"):
            self.engine.connect(transport, info)

    def begin_update(self) -> None:
        """Begin to take weights."""
        with self.doing("receive"):
            self.engine.begin_update()

    def take_sent(self, info: dict[str, Any]) -> None:
        """Take the weights that are being sent."""
        with self.doing("receive"):
            self.engine.take_sent(info)

    def finish_update(self, version: int, checksum: str) -> None:
        """Check the weights that came and adopt them."""
        with self.doing("receive"):
            self.engine.finish_update(version, checksum)

    def go_to(self, level: int) -> None:
        """Have so much on the device as ``level`` says, a ``Level`` of ``planning/colocation/phases.py``."""
        with self.doing("go_to"):
            self.engine.go_to(Level(level))

    def probe(self) -> Probe:
        """What the engine says about itself."""
        return self.engine.probe()


class RanksHandle:
    """The fleet's way to one engine that is a rank somewhere."""

    GRACE_S = 30.0
    """How much longer than its own deadline a call may take before the process counts as failed."""

    def __init__(self, ranks: Ranks, config: RolloutConfig) -> None:
        self.ranks = ranks
        self._floor_s = config.update_timeout_s
        self.restarted()

    def restarted(self) -> None:
        """A new process answers from now on, perhaps on another node: how fast it takes weights is not known."""
        self._updates = UpdateDeadline(self._floor_s)

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        return self._sample("generate", requests, deadline_s, deadline_s)

    def advance(
        self, requests: Sequence[GenerationRequest], seconds: float, deadline_s: float
    ) -> Pending[list[Generation]]:
        return self._sample("advance", requests, seconds, deadline_s)

    def _sample(
        self, method: str, requests: Sequence[GenerationRequest], seconds: float, deadline_s: float
    ) -> Pending[list[Generation]]:
        limit_s = deadline_s + self.GRACE_S
        key = f"rollout.timeout_s, to which {self.GRACE_S:g} s are added"
        answer = self.ranks.call(method, [(list(requests), seconds)], phase="generate", timeout_s=limit_s, key=key)
        return answer.then(lambda values: values[0])

    def receive(self, weights: PublishedWeights) -> Pending[Execution | None]:
        limit = self._updates.limit(weights.ways)
        timeout_s, key = (None, None) if limit is None else (limit.seconds, limit.key)
        answer, updates = self.ranks.call("receive", [(weights,)], timeout_s=timeout_s, key=key), self._updates

        def note(values: list[tuple[Taken, Execution]]) -> Execution:
            taken, record = values[0]
            updates.took(taken)  # of the process that was asked, which may be another one by now
            return record

        return answer.then(note)

    def execution(self) -> Pending[Execution | None]:
        return self.ranks.call("execution", [()], timeout_s=self.GRACE_S).then(lambda values: values[0])

    def probe(self) -> Pending[Probe]:
        answer = self.ranks.call("probe", [()], timeout_s=self.GRACE_S)
        return answer.then(lambda values: values[0])
