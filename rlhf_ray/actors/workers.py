"""The plain classes that do the work: one rank of one role, one model, one DeepSpeed engine. No Ray here.

Always true: every method that computes is called on all ranks of the group with the same number of micro-batches (an empty
one is a dummy), so that no collective waits for a rank that has nothing to do; results travel with the indices of the
sequences they belong to. Methods that train never decide alone: ``accumulate`` reports, the driver votes, ``apply`` obeys.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_ray.algorithms.losses import LossOutput, Metrics
from rlhf_ray.algorithms.reward_losses import RewardOutputs
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.engine import distributed
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.engine.settings import deepspeed_config
from rlhf_ray.imports import quick_imports
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack
from rlhf_ray.trajectories.schedule import MicroBatch

if TYPE_CHECKING:
    from rlhf_ray.engine.engine import Engine
    from rlhf_ray.models.forward.parallel_packs import Streams

Part = tuple[MicroBatch, "np.ndarray[Any, Any]"]
Loss = Callable[[Any, TrajectoryBatch], LossOutput]


@dataclass(frozen=True)
class WorkerSetup:
    """What a rank needs to know before it can load its model."""

    config: RoleConfig
    seed: int
    total_updates: int | None = None
    """Optimizer updates of the whole run, for the learning-rate schedule; none makes the rank forward-only."""
    temperature: float = 1.0
    address: str | None = None
    """``host:port`` of rank 0's rendezvous; none for a single rank."""
    max_tokens: int = 4096
    """Token budget of a micro-batch that the rank forms itself (scoring)."""
    max_item_tokens: int = 4096
    """Longest item that is scored."""
    routers: bool = False
    """Whether the loss of a reward model reads how its routers use their experts."""


class ModelWorker:
    """What all roles share: the rendezvous, the engine, training by loss sums, saving."""

    role = "model"
    engine: Engine

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        with quick_imports():  # here, while others start too, and not in the driver, which only names this class
            importlib.import_module("rlhf_ray.engine.engine")
        self.rank = rank
        self.world_size = world_size
        self.phase = "starting"

    def rendezvous(self) -> str:
        """A free ``host:port`` on this rank's machine."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"{socket.gethostbyname(socket.gethostname())}:{port}"

    def setup(self, setup: WorkerSetup) -> str:
        """Load the model and make the engine; returns the loader's one-line report."""
        self.config = setup.config
        self.settings = setup
        torch.set_num_threads(setup.config.resources.threads_per_rank)
        torch.manual_seed(setup.seed + self.rank)
        self._meet(setup.address)
        module, line = self._load(setup)
        from rlhf_ray.engine.engine import Engine

        self.engine = Engine(
            module,
            setup.config.engine,
            dtype=setup.config.model.dtype,
            total_updates=setup.total_updates,
            trainable=setup.total_updates is not None,
        )
        self.device = self.engine.device
        self.phase = "ready"
        return line

    def _meet(self, address: str | None) -> None:
        """Join the group's ranks; a single rank meets itself, and shares a process with others of its kind in tests."""
        if self.world_size == 1 and torch.distributed.is_initialized():
            return
        host, _, port = (address or self.rendezvous()).rpartition(":")
        distributed.init_process_group(self.rank, self.world_size, host, int(port))

    def _load(self, setup: WorkerSetup) -> tuple[torch.nn.Module, str]:
        """The module that the engine wraps, and one line about it."""
        raise TypeError(f"{type(self).__name__} is not a role: use one of its subclasses")

    def _ds_config(self, setup: WorkerSetup) -> dict[str, Any] | None:
        """What the loader needs to build the model in shards; none where every rank holds it whole."""
        if setup.config.engine.zero != 3:
            return None
        trainable = setup.total_updates is not None
        return deepspeed_config(
            setup.config.engine, dtype=setup.config.model.dtype, trainable=trainable, world_size=self.world_size
        )

    def health(self) -> dict[str, Any]:
        """Who this is and what it does, without touching the model."""
        return {"role": self.role, "rank": self.rank, "phase": self.phase, "pid": os.getpid()}

    # ------------------------------------------------------------------------------------------------------ training

    def accumulate(
        self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch], loss: Loss, denominator: float
    ) -> Report:
        """Gradients of the loss sums of ``micro_batches`` over ``denominator``; the finite flag covers all ranks."""
        self.phase = "accumulate"

        def step(module: torch.nn.Module, micro_batch: MicroBatch) -> LossOutput:
            packed = (pack(batch, micro_batch) if micro_batch else Packed.dummy()).to(self.device)
            outputs = self._outputs(module, packed)
            if not micro_batch:
                return LossOutput(_graph_anchor(outputs) * 0.0, _computed(packed, needed=False))
            part = batch.select(micro_batch).to(self.device)
            found = loss(outputs, part)
            return LossOutput(found.loss, {**found.metrics, **_computed(packed, needed=True)})

        report = self.engine.accumulate(micro_batches, step, denominator)
        self.phase = "ready"
        return report

    def _outputs(self, module: torch.nn.Module, packed: Packed) -> Any:
        """What this role's losses read: the module's outputs on a pack, with gradients."""
        raise TypeError(f"{type(self).__name__} does not train")

    def apply(self, skip: bool) -> Applied:
        """One optimizer step, or none at all: the same on every rank."""
        return self.engine.apply(skip=skip)

    # ------------------------------------------------------------------------------------------------------- forward

    def forward_parts(
        self,
        batch: TrajectoryBatch,
        micro_batches: Sequence[MicroBatch],
        forward: Callable[[torch.nn.Module, Packed], torch.Tensor],
        streams: Streams | None = None,
    ) -> list[Part]:
        """``forward`` without gradients on each micro-batch, in float32, with the sequences that it covers.

        ``streams`` run several side by side, where there are several.
        """
        packs = (pack(batch, micro_batch) if micro_batch else Packed.dummy() for micro_batch in micro_batches)
        values: Iterable[torch.Tensor]
        if streams is not None and len(micro_batches) > 1:
            values = self.engine.evaluate(lambda module: streams.map(module, forward, packs))
        else:
            values = (
                self.engine.evaluate(lambda module, packed=packed: forward(module, packed.to(self.device)))
                for packed in packs
            )
        parts = zip(micro_batches, values, strict=True)
        return [(micro_batch, value.float().cpu().numpy()) for micro_batch, value in parts if micro_batch]

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, directory: str) -> None:
        """Everything this rank needs to go on bit for bit: weights, optimizer state, random state."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.engine.save_shards(Path(directory))

    def load(self, directory: str) -> None:
        self.engine.load_shards(Path(directory))

    def save_pretrained(self, directory: str, metadata: dict[str, Any] | None = None) -> None:
        """A plain Hugging Face directory, written by rank 0; every rank takes part in gathering."""
        from rlhf_ray.models import load_tokenizer, save_pretrained

        state = dict(self.disk_weights())
        if self.rank == 0:
            save_pretrained(
                self.hf_model, load_tokenizer(self.config.model), directory, state=state, metadata=metadata or {}
            )

    def disk_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights by their names on disk, on rank 0; the other ranks take part and get none."""
        return self.engine.disk_weights(self.hf_model)

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model inside the module."""
        raise TypeError(f"{type(self).__name__} holds no model")


class _CausalWorker(ModelWorker):
    """Log-probs of a causal model."""

    def _load(self, setup: WorkerSetup) -> tuple[torch.nn.Module, str]:
        from rlhf_ray.models import PackedPolicy, load_policy
        from rlhf_ray.models.description import describe

        self.actor = load_policy(setup.config.model, ds_config=self._ds_config(setup), seed=setup.seed)
        return PackedPolicy(self.actor), describe(self.actor)

    @property
    def hf_model(self) -> Any:
        return self.actor.model

    def log_probs(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """log p(token t | tokens before t) at the sampling temperature, for every token of this rank's sequences."""
        self.phase = "log_probs"
        temperature = self.settings.temperature
        parts = self.forward_parts(
            batch, micro_batches, lambda module, packed: module(packed, temperature=temperature).log_probs
        )
        self.phase = "ready"
        return parts


class ReferenceWorker(_CausalWorker):
    """The frozen policy that KL is measured against."""

    role = "reference"


class PolicyWorker(_CausalWorker):
    """The policy: log-probs, training, and its weights for the rollout engines."""

    role = "policy"

    def _outputs(self, module: torch.nn.Module, packed: Packed) -> Any:
        return module(packed, temperature=self.settings.temperature, with_entropy=True)

    def publish_weights(self, version: int) -> Any:
        """All weights by their names on disk, in buckets with checksums; rank 0 has them, the others take part."""
        from rlhf_ray.rollout.wire import publish

        self.phase = "publish_weights"
        weights = publish(version, self.disk_weights())
        self.phase = "ready"
        return weights if self.rank == 0 else None


class CriticWorker(ModelWorker):
    """The value of the state in which each token was chosen."""

    role = "critic"
    model_type = "critic"

    def _load(self, setup: WorkerSetup) -> tuple[torch.nn.Module, str]:
        from rlhf_ray.models import PackedRegression, load_regression
        from rlhf_ray.models.description import describe

        self.model = load_regression(
            setup.config.model, self.model_type, ds_config=self._ds_config(setup), seed=setup.seed
        )
        return PackedRegression(self.model), describe(self.model)

    @property
    def hf_model(self) -> Any:
        return self.model

    def _outputs(self, module: torch.nn.Module, packed: Packed) -> Any:
        return module(packed, kind="values")

    def values(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """The value at every token of this rank's sequences; undefined where no action was chosen."""
        self.phase = "values"
        parts = self.forward_parts(batch, micro_batches, lambda module, packed: module(packed, kind="values"))
        self.phase = "ready"
        return parts


def _computed(packed: Packed, *, needed: bool) -> Metrics:
    """What a pack cost beside what its sequences hold: tokens that nothing needs, tokens shared by several sequences."""
    computed, whole = torch.tensor(packed.num_tokens), torch.tensor(len(packed.of_sequences))
    if not needed:
        return {"padding/share": (computed, computed)}
    return {"padding/share": (torch.tensor(0), computed), "shared_prefix/share": (whole - computed, whole)}


def _graph_anchor(outputs: Any) -> torch.Tensor:
    """A scalar that depends on every output, so that a dummy micro-batch enters every collective of the backward."""
    if isinstance(outputs, RewardOutputs):
        return outputs.scores.sum() + (0.0 if outputs.router_balance is None else outputs.router_balance)
    tensor = outputs if isinstance(outputs, torch.Tensor) else outputs.log_probs
    return tensor.sum()
