"""The worker of one rank with one model in one DeepSpeed engine: training, forward passes and saving. No Ray here.

Invariants:

- Every method that computes is called on all ranks of the group with the same number of micro-batches. An empty one is a
  dummy, so that no collective waits for a rank that has nothing to do.
- Results travel with the indices of the sequences they belong to.
- A rank never decides alone whether to train: ``accumulate`` reports, the driver votes, ``apply`` obeys.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.algorithms.losses import LossOutput, Metrics
from rlhf_ray.algorithms.reward_losses import RewardOutputs
from rlhf_ray.config.files.positions import longest_sequence, too_long
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.engine import distributed
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.engine.saving.room import Room
from rlhf_ray.engine.saving.writer import Written
from rlhf_ray.engine.settings import deepspeed_config
from rlhf_ray.environment import keep_freed_memory
from rlhf_ray.errors import RequestError
from rlhf_ray.imports import quick_imports
from rlhf_ray.network import LOOPBACK
from rlhf_ray.planning.colocation.phases import Level
from rlhf_ray.rollout.requests import NO_VERSION
from rlhf_ray.storage.manifest import FileRecord, hash_files
from rlhf_ray.storage.shared import SharedFile
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack
from rlhf_ray.trajectories.schedule import MicroBatch

if TYPE_CHECKING:
    from rlhf_ray.engine.engine import Engine
    from rlhf_ray.models.forward.parallel_packs import ParallelPacks

Part = tuple[MicroBatch, "np.ndarray[Any, Any]"]
"""Indices of sequences, and the numbers of those sequences one after another."""
Loss = Callable[[Any, TrajectoryBatch], LossOutput]
Forward = Callable[[torch.nn.Module, Packed], torch.Tensor]


@dataclass(frozen=True)
class WorkerSetup:
    """What every rank must know before it can load its model."""

    config: RoleConfig
    seed: int
    total_updates: int | None = None
    """Optimizer updates of the whole run, for the learning-rate schedule. None for a rank that does not train."""
    rendezvous: tuple[str, int] | None = None
    """Address and port where the ranks meet. None for a single rank."""
    shared: SharedFile | None = None
    """A file by which a rank that writes into the run directory tells whether its node sees it."""
    longest: int | None = None
    """Tokens of the longest sequence that the job may bring; None where each is looked at when it comes."""
    collective_timeout_s: float = distributed.TIMEOUT_S
    """Seconds after which a rank gives up waiting for the others in a collective operation."""


class Vocabulary(NamedTuple):
    """What decides whether a model can read the ids of another one."""

    fingerprint: str
    """That of its tokenizer."""
    rows: int
    """Of its embedding: tokens, and padding behind them."""


Setup = TypeVar("Setup", bound=WorkerSetup)


class ModelWorker(Worker, ABC, Generic[Setup]):
    """What all roles with a model share; a subclass says which model it loads and what its losses read."""

    role = "model"
    engine: Engine
    settings: Setup
    tokenizer: Any = None
    """The tokenizer of a model that reads texts; others get token ids alone."""
    over_kept_sets: ClassVar[bool] = False
    """Whether this role's numbers are of the sets among which tokens were sampled."""
    replays_routing: ClassVar[bool] = False
    """Whether this role's model sends each token to the experts that the engine chose, where the batch says so."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        with quick_imports():  # here, while others start too, and not in the driver, which only names this class
            importlib.import_module("rlhf_ray.engine.engine")
        super().__init__(rank, world_size)

    @abstractmethod
    def _load(self, setup: Setup) -> tuple[torch.nn.Module, str]:
        """The module that the engine wraps, and one line about it."""

    @property
    @abstractmethod
    def hf_model(self) -> Any:
        """The Hugging Face model inside the module."""

    def _outputs(self, module: torch.nn.Module, packed: Packed, sequences: TrajectoryBatch | None, loss: Loss) -> Any:
        """What ``loss`` reads: the module's outputs on a pack of ``sequences``, with gradients.

        A dummy pack has no sequences.
        """
        raise TypeError(f"{type(self).__name__} does not train")

    # Starting

    def setup(self, setup: Setup) -> str:
        """Load the model and make the engine; returns the loader's one-line report.

        Raises :class:`CapacityError` before anything is allocated if the device that this rank was placed on is not there.
        """
        self.require_shared(setup.shared)
        self.config = setup.config
        self.settings = setup
        self.device = self.take_device(setup.config.resources)
        torch.set_num_threads(setup.config.resources.threads_per_rank)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(setup.seed + self.rank)
        self._meet(setup.rendezvous, setup.collective_timeout_s)
        module, line = self._load(setup)
        self._read_the_longest(setup.longest)
        from rlhf_ray.engine.engine import Engine

        self.engine = Engine(
            module,
            setup.config.engine,
            dtype=setup.config.model.dtype,
            total_updates=setup.total_updates,
            trainable=setup.total_updates is not None,
        )
        self.phase = "ready"
        return line

    def hold_rendezvous(self, address: str, port: int = 0) -> int | None:
        if self.rank != 0:
            return None
        self._store = distributed.rendezvous(self.rank, self.world_size, address, port)
        return int(self._store.port)

    def _meet(self, rendezvous: tuple[str, int] | None, timeout_s: float) -> None:
        """Join the group's other ranks. Single ranks of several roles in one process share one process group."""
        # On a GPU the ranks of one node may meet engines of another, and NCCL reads the interface once in a process.
        near = self.device.type == "cpu" and (rendezvous is None or rendezvous[0] == LOOPBACK)
        address = LOOPBACK if near else self.node_address()
        if self.world_size == 1:
            if not torch.distributed.is_initialized():
                distributed.init_process_group(
                    self.rank, self.world_size, None, device=self.device, address=address, timeout_s=timeout_s
                )
            return
        assert rendezvous is not None, "the driver says where several ranks meet"
        store = (
            self._store
            if self.rank == 0
            else distributed.rendezvous(self.rank, self.world_size, *rendezvous, timeout_s=timeout_s)
        )
        distributed.init_process_group(
            self.rank, self.world_size, store, device=self.device, address=address, timeout_s=timeout_s
        )

    def _read_the_longest(self, longest: int | None) -> None:
        """Refuse a model with fewer positions: one that comes from a hub is first seen here."""
        config = self.hf_model.config.get_text_config().to_dict()
        positions = longest_sequence(config)
        if longest is not None and positions is not None and longest > positions:
            raise RequestError(too_long(longest, f"{self.config.model.path} ({self.role})", positions, config))

    def _ds_config(self, setup: Setup) -> dict[str, Any] | None:
        """What the loader needs to build the model in shards. None if every rank holds the whole model."""
        if setup.config.engine.zero != 3:
            return None
        trainable = setup.total_updates is not None
        return deepspeed_config(
            setup.config.engine, dtype=setup.config.model.dtype, trainable=trainable, world_size=self.world_size
        )

    # Training

    def accumulate(
        self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch], loss: Loss, denominator: float
    ) -> Report:
        """Gradients of the loss sums of ``micro_batches`` over ``denominator``; the finite flag covers all ranks."""

        def step(module: torch.nn.Module, micro_batch: MicroBatch) -> LossOutput:
            packed = self._pack(batch, micro_batch).to(self.device)
            sequences = _numbers(batch).select(micro_batch).to(self.device) if micro_batch else None
            outputs = self._outputs(module, packed, sequences, loss)
            if sequences is None:
                return LossOutput(_graph_anchor(outputs) * 0.0, _packing_metrics(packed, is_dummy=True))
            output = loss(outputs, sequences)
            return LossOutput(output.loss, {**output.metrics, **_packing_metrics(packed, is_dummy=False)})

        with self.doing("accumulate"):
            return self.engine.accumulate(micro_batches, step, denominator)

    def apply(self, skip: bool, limit: float = math.inf) -> Applied:
        """One optimizer step, or none at all, as where the norm of the gradient is above ``limit``: the same on every rank."""
        return self.engine.apply(skip=skip, limit=limit)

    # Forward passes

    def forward_parts(
        self,
        batch: TrajectoryBatch,
        micro_batches: Sequence[MicroBatch],
        forward: Forward,
        streams: ParallelPacks | None = None,
    ) -> list[Part]:
        """``forward`` without gradients on each micro-batch, in float32, with the sequences that it covers.

        With ``streams``, several micro-batches run side by side.
        """
        packs = (self._pack(batch, micro_batch) for micro_batch in micro_batches)
        values: Iterable[torch.Tensor]
        if streams is not None and len(micro_batches) > 1:
            values = self.engine.evaluate(lambda module: streams.map(module, forward, packs))
        else:
            values = (self._evaluate(forward, packed) for packed in packs)
        parts = zip(micro_batches, values, strict=True)
        return [(micro_batch, value.float().cpu().numpy()) for micro_batch, value in parts if micro_batch]

    def _sampled(self, batch: TrajectoryBatch, micro_batch: MicroBatch) -> Bool[Tensor, "tokens"] | None:
        """The sampled tokens of a micro-batch; None for a dummy."""
        return sampled_tokens(_numbers(batch).select(micro_batch).to(self.device)) if micro_batch else None

    def _pack(self, batch: TrajectoryBatch, micro_batch: MicroBatch) -> Packed:
        if not micro_batch:
            return Packed.dummy()
        return pack(batch, micro_batch, with_kept=self.over_kept_sets, with_routed=self.replays_routing)

    def _evaluate(self, forward: Forward, packed: Packed) -> torch.Tensor:
        return self.engine.evaluate(lambda module: forward(module, packed.to(self.device)))

    def go_to(self, level: int) -> None:
        """Have so much on the device as ``level`` says, a ``Level`` of ``planning/colocation/phases.py``."""
        with self.doing("go_to"):
            if level == Level.ALL:
                self.engine.reload()
            else:
                self.engine.offload(keep_weights=level == Level.WEIGHTS)

    # Files

    def save(self, directory: str) -> dict[str, FileRecord]:
        """Everything this rank needs to go on bit for bit, on the model that it loaded: weights that train, optimizer state,
        random state. Returns the size and hash of every file that it wrote, by its path below ``directory``.
        """
        return self.engine.save_shards(Path(directory))

    def begin_save(self, directory: str) -> None:
        """Copy in memory what :meth:`save` writes, and write it while the next calls run."""
        self.engine.begin_saving(Path(directory))

    def saved(self) -> Written:
        """Wait for what :meth:`begin_save` began, beside all other calls; returns the files of :meth:`save`."""
        return self.engine.saved()

    def room_to_save(self) -> Room:
        """What the copy of :meth:`begin_save` takes of this machine's memory, and what is free of it."""
        return self.engine.room_to_save()

    def load(self, directory: str) -> None:
        """Go on from what ``save`` wrote in a committed checkpoint, whatever the number of ranks then."""
        base = self.config.model.path or f"the made model ({self.role})"
        checkpoint = Path(directory).parent
        self.engine.load_shards(Path(directory), base=base, scratch=checkpoint.parent)

    def save_pretrained(self, directory: str, metadata: dict[str, Any] | None = None) -> None:
        """A plain Hugging Face directory, written by rank 0; every rank takes part in gathering."""
        from rlhf_ray.models import load_tokenizer, save_pretrained

        state = dict(self.disk_weights())
        if self.rank == 0:
            tokenizer = load_tokenizer(self.config.model) if self.tokenizer is None else self.tokenizer
            save_pretrained(self.hf_model, tokenizer, directory, state=state, metadata=metadata or {})

    def hash_files(self, directory: str) -> dict[str, FileRecord]:
        """The size and hash of every file in a directory that rank 0 has written, from there; none from other ranks."""
        return hash_files(directory) if self.rank == 0 else {}

    def vocabulary(self) -> Vocabulary:
        """The tokens that this rank's model was loaded with."""
        from rlhf_ray.data.tokenizers import fingerprint
        from rlhf_ray.models import load_tokenizer

        tokenizer = load_tokenizer(self.config.model) if self.tokenizer is None else self.tokenizer
        return Vocabulary(fingerprint(tokenizer), int(self.hf_model.config.get_text_config().vocab_size))

    def disk_weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Copies of the whole weights by their names on disk, on rank 0; the other ranks take part and get none."""
        return self.engine.disk_weights(self.hf_model)


def _numbers(batch: TrajectoryBatch) -> TrajectoryBatch:
    """What losses read of a batch: not the sets and experts, which only packs need."""
    return batch.without_kept().without_routed()


def sampled_tokens(batch: TrajectoryBatch) -> Bool[Tensor, "tokens"]:
    """The tokens whose log-probs and values are read: those that were sampled; every action in a batch of demonstrations.

    Not the actions of a batch that was sampled: what a loss leaves out would then move the others to other places in the chunks
    of the output layer, where their last bits may differ, and the first ratio would not be exactly 1.
    """
    return batch["weight_version"] != NO_VERSION if "weight_version" in batch else batch["action_mask"]


def _packing_metrics(packed: Packed, *, is_dummy: bool) -> Metrics:
    """Sums and counts of what packing wastes and saves.

    ``padding/share``: tokens that were computed although no sequence needs them, of all that were computed.
    ``shared_prefix/share``: tokens that were not computed again because sequences share them, of all tokens of the sequences.
    """
    computed, in_sequences = torch.tensor(packed.num_tokens), torch.tensor(len(packed.sequence_tokens))
    if is_dummy:
        return {"padding/share": (computed, computed)}
    return {
        "padding/share": (torch.tensor(0), computed),
        "shared_prefix/share": (in_sequences - computed, in_sequences),
    }


def _graph_anchor(outputs: Any) -> torch.Tensor:
    """A scalar that depends on every output, so that a dummy micro-batch enters every collective of the backward."""
    if isinstance(outputs, RewardOutputs):
        return outputs.scores.sum() + (0.0 if outputs.router_balance is None else outputs.router_balance)
    if isinstance(outputs, torch.Tensor):
        return outputs.sum()
    anchor: torch.Tensor = outputs.log_probs.sum()
    return anchor if outputs.divergence is None else anchor + outputs.divergence.sum()
