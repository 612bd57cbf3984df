"""Train one model with DeepSpeed: add up the gradients of an update, agree that they are finite, and apply them.

Invariants: the gradient of an update does not depend on how its batch was split into ranks and micro-batches. A skipped
update leaves weights, optimizer and schedule as they were on every rank, and the next update is as if the skipped one had
never happened (in fp16 except for the loss scale). Nothing here knows which algorithm runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.config.sections.models import Dtype
from rlhf_ray.engine import shards
from rlhf_ray.engine.distributed import all_agree, await_all, keep_deadline, min_and_max, require_process_group
from rlhf_ray.engine.frozen import Digests, frozen_digests, frozen_names
from rlhf_ray.engine.gradients import FullPrecisionSums, GradientWatch, clear_shards, norm_in_step, step_in_fewer_passes
from rlhf_ray.engine.offload import OffDevice
from rlhf_ray.engine.optimizer import SkippableAdamW, full_shape, parameter_groups
from rlhf_ray.engine.report import Applied, Report, Totals
from rlhf_ray.engine.saving.copies import Copies
from rlhf_ray.engine.saving.room import Room, room_for
from rlhf_ray.engine.saving.writer import Background, Written
from rlhf_ray.engine.schedules import check_schedule, learning_rate
from rlhf_ray.engine.settings import casts_in_engine, clips_in_optimizer, deepspeed_config, sums_in_engine
from rlhf_ray.engine.weights import copied, disk_weights, gathered_groups
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.models.devices import take_peak
from rlhf_ray.models.dtypes import DTYPES
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.experts import expert_blocks
from rlhf_ray.storage import storage_errors
from rlhf_ray.storage.manifest import FileRecord

MicroBatch = TypeVar("MicroBatch")
Result = TypeVar("Result")


class Program(nn.Module):
    """The module that DeepSpeed wraps: its forward runs any function of ``module``.

    DeepSpeed notices the start of a backward pass by hooks on what a forward returns, and it finds tensors only in tuples,
    lists and dicts. With this class it always sees the loss itself, whatever ``module`` returns and however often it runs.
    Its state, which DeepSpeed saves, has no frozen weights: DeepSpeed leaves these out under one of their names only.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        """Return ``function(module)``."""
        return function(self.module)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # any arguments of torch
        """The state of the module without its frozen weights."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for name in frozen_names(self):
            state.pop(name, None)
        return state


def largest_layer(module: nn.Module) -> int:
    """Count the elements of the largest layer, also where ZeRO-3 has split it; 0 for a model without a list of layers."""
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList))
    layers = (layer for part in lists for layer in part)
    return max((sum(full_shape(weight).numel() for weight in layer.parameters()) for layer in layers), default=0)


class Engine:
    """One rank's part of a model, its optimizer and its schedule. All ranks must call the same methods in the
    same order.
    """

    def __init__(
        self, module: nn.Module, config: EngineConfig, *, dtype: Dtype, total_updates: int | None, trainable: bool
    ) -> None:
        require_process_group()
        self.module, self.config, self.dtype, self.trainable = module, config, dtype, trainable
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.total_updates, self.updates, self._pending = total_updates, 0, False
        if not trainable:
            module.requires_grad_(False)
        if casts_in_engine(config, trainable) or config.zero == 3:
            cast_parameters(module, DTYPES[dtype])
        # Under ZeRO-3 vectors such as norms and biases stay whole on every rank.
        whole_below = max(
            (shape.numel() for shape in map(full_shape, module.parameters()) if len(shape) < 2), default=0
        )
        settings = deepspeed_config(
            config,
            dtype=dtype,
            trainable=trainable,
            world_size=self.world_size,
            whole_below=whole_below,
            layer=largest_layer(module),
        )
        if config.zero == 3:
            _gather_experts_together(module)
        self.optimizer = self._make_optimizer() if trainable else None
        await_all()
        self._deepspeed, *_ = deepspeed.initialize(
            model=Program(module), optimizer=self.optimizer, config=settings, dist_init_required=None
        )
        keep_deadline(self._deepspeed.data_parallel_group)
        if self.optimizer is not None:
            self.optimizer.whole_norm = partial(norm_in_step, self._deepspeed)
            step_in_fewer_passes(self._deepspeed)
        self.device = self._deepspeed.device
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._watch = GradientWatch(self._trained, self.device)
        self._kept_bytes = 0
        """Whether a copy of the state was made before."""
        self._writing: Background[dict[str, FileRecord]] | None = None
        self._off = OffDevice(self._deepspeed, module, self.device, trainable=trainable)
        self._sums = FullPrecisionSums(self._trained) if trainable and sums_in_engine(config, dtype) else None

    def _make_optimizer(self) -> SkippableAdamW:
        assert self.config.optimizer is not None
        check_schedule(self.config.optimizer, self.total_updates)
        groups = parameter_groups(self.module, self.config.optimizer.weight_decay)
        if not groups:
            raise RequestError("the model has no parameter to train: every one of them is frozen")
        clip = self.config.optimizer.max_grad_norm if clips_in_optimizer(self.config, self.dtype) else None
        return SkippableAdamW(groups, self.config.optimizer, max_grad_norm=clip)

    def accumulate(
        self,
        micro_batches: Iterable[MicroBatch],
        step: Callable[[nn.Module, MicroBatch], LossOutput],
        denominator: float,
    ) -> Report:
        """Add up the gradient of ``sum of losses / denominator`` over all micro-batches of all ranks.

        ``step`` returns the loss of one micro-batch as a sum, not a mean. The loss must depend on the output of the module
        even if it is zero, since ranks meet in every call of the module. All ranks need equally many micro-batches.
        """
        self._expect(pending=False, call="accumulate")
        if not denominator > 0:
            raise RlhfRayError(f"the denominator of an update is {denominator}, but must be above 0")
        own_batches = list(micro_batches)
        fewest, most = min_and_max(len(own_batches), self.device)
        if fewest != most or fewest == 0:
            raise RlhfRayError(
                f"ranks have {fewest} to {most} micro-batches, but all need equally many, at least one: fill up with dummies"
            )
        self._pending = True
        self._deepspeed.train()
        if self.config.zero == 3:
            clear_shards(self._trained)
        totals = Totals(self.device)
        for micro_batch in own_batches:
            loss, metrics = self._deepspeed(lambda module, m=micro_batch: _loss_and_metrics(step(module, m)))
            self._deepspeed.backward(loss * (self.world_size / denominator))
            self._watch.end_pass()
            totals.add(loss, metrics)
        finite, missed = self._watch.end_update()
        if self.config.offload != "none":
            self._refuse_unreached(missed)
        # fp16 gradients overflow in the normal course of loss scaling: DeepSpeed's scaler judges them, in apply.
        finite = totals.finite() and (finite or self.dtype == "fp16")
        return totals.report(denominator=denominator, finite=self.vote(finite))

    def _refuse_unreached(self, missed: int) -> None:
        """Refuse an update in which some pass left parameters out, if gradients are offloaded.

        DeepSpeed 0.19 would keep the old gradient of such a parameter and add it to a later update.
        """
        most = min_and_max(missed, self.device)[1]
        if most > 0:
            raise RlhfRayError(
                f"{most} of {len(self._trained)} parameters got no gradient from some micro-batch, which DeepSpeed gets wrong "
                f"with engine.offload {self.config.offload}: set it to none, or let every micro-batch use the whole model"
            )

    def vote(self, finite: bool) -> bool:
        """Return whether every rank passes true. ``accumulate`` calls this itself."""
        return all_agree(finite, self.device)

    def apply(self, skip: bool, limit: float = math.inf) -> Applied:
        """Apply the accumulated update; drop it with ``skip``, or if its gradient norm over all ranks is not finite.

        One whose norm is above ``limit`` is dropped too.
        """
        self._expect(pending=True, call="apply")
        assert self.optimizer is not None and self.config.optimizer is not None
        rate = learning_rate(self.config.optimizer, self.updates, self.total_updates)
        self.optimizer.set_learning_rate(rate)
        if self._sums is not None:
            self._sums.hand_over()
        self.optimizer.skip, self.optimizer.limit, self.optimizer.refused_norm = skip, limit, None
        self._deepspeed.step()
        self.optimizer.skip = True
        self._pending = False
        norm, gpu, refused = self._grad_norm(), take_peak(self.device), self.optimizer.refused_norm
        if skip or norm is None or refused is not None:
            return Applied(True, None, rate, self.updates, gpu, refused)
        self.updates += 1
        return Applied(False, norm, rate, self.updates, gpu)

    def _grad_norm(self) -> float | None:
        """Return the gradient norm of the last step over all ranks, or None if it was not finite."""
        assert self.optimizer is not None
        norm = self.optimizer.grad_norm
        if self.optimizer.max_grad_norm is None:
            norm = self._deepspeed.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        return norm if self._deepspeed.was_step_applied() and torch.isfinite(torch.tensor(norm)) else None

    def _expect(self, *, pending: bool, call: str) -> None:
        if not self.trainable:
            raise RlhfRayError(f"{call}: this engine was made with trainable=False, so it only evaluates")
        self._require_here(call)
        if self._pending != pending:
            missing = "call accumulate first" if pending else "call apply first, to end the last update"
            raise RlhfRayError(f"{call}: {missing}")

    def evaluate(self, function: Callable[[nn.Module], Result]) -> Result:
        """Return ``function(module)`` in evaluation mode, without gradients."""
        self._require_here("evaluate")
        if self._pending:
            raise RlhfRayError("evaluate: call apply first, to end the last update")
        self._deepspeed.eval()
        with torch.no_grad():
            result: Result = self._deepspeed(function)
        return result

    def offload(self, *, keep_weights: bool) -> None:
        """Move what this rank holds to the host, or all of it but the weights; it computes nothing before :meth:`reload`.

        Between two updates alone. What DeepSpeed cannot move, ``config/checks/colocation.py`` refuses before a job starts.
        """
        if self._pending:
            raise RlhfRayError("offload: call apply first, to end the last update")
        self._off.offload(keep_weights=keep_weights)

    def reload(self) -> None:
        """Bring all that was moved to the host back to the device."""
        self._off.reload()

    def _require_here(self, call: str) -> None:
        if self._off.is_away:
            raise RlhfRayError(f"{call}: what this engine needs was moved to the host: reload it first")

    def save_shards(self, directory: Path) -> dict[str, FileRecord]:
        """Write this rank's part of weights, optimizer and random state into ``directory``.

        Returns the size and hash of every file that this rank wrote, by its path below ``directory``.
        """
        self._expect(pending=False, call="save_shards")
        frozen = self._frozen
        with storage_errors(directory, needed=self.shard_bytes):
            return shards.save(self._deepspeed, directory, self._identity(), self.updates, frozen).write()

    def begin_saving(self, directory: Path) -> None:
        """What :meth:`save_shards` does, of which only a copy in memory is made now: a thread writes it. Collective.

        Training may go on at once. :meth:`saved` waits for the thread; so does the next call of this, and :meth:`close`.
        """
        self._expect(pending=False, call="begin_saving")
        self._end_saving()
        frozen, copies = self._frozen, Copies()
        with storage_errors(directory, needed=self.shard_bytes):
            state = shards.save(self._deepspeed, directory, self._identity(), self.updates, frozen, copies)
        self._kept_bytes = copies.pinned_bytes

        def write() -> dict[str, FileRecord]:
            with storage_errors(directory, needed=self.shard_bytes):
                return state.write()

        self._writing = Background(write, "checkpoint")

    def saved(self) -> Written:
        """Wait for what :meth:`begin_saving` began; returns the files of :meth:`save_shards`, or raises what went wrong.

        Not collective, and it may be called beside any other method.
        """
        writing = self._writing
        if writing is None:
            raise RlhfRayError("saved: call begin_saving first")
        return Written(writing.result(), writing.seconds)

    def room_to_save(self) -> Room:
        """What the copy of :meth:`begin_saving` takes of this machine's memory, and what is free of it.

        The pinned memory of the copy before counts as there: torch keeps it for the next one. Other memory went back to the
        machine when that copy was written.
        """
        return room_for(max(0, self.shard_bytes - self._kept_bytes))

    def _end_saving(self) -> None:
        if self._writing is not None:
            with suppress(Exception):  # whoever wanted the files has asked saved
                self._writing.result()
        self._writing = None

    def load_shards(self, directory: Path, base: str = "the model", *, scratch: Path | None = None) -> None:
        """Restore what ``save_shards`` wrote, to go on bit for bit; but for rounding, if that group was of another size.

        ``base`` says in an error where the frozen weights came from, if they are others than before. ``scratch`` is a directory
        that all ranks see, by default the one that ``directory`` lies in: a group of another size writes there meanwhile.
        Gradients that were added up since the last update are dropped.
        """
        if self._pending:
            self.apply(skip=True)
        self._expect(pending=False, call="load_shards")
        self.updates = shards.load(
            self._deepspeed,
            directory,
            self._identity(),
            self._frozen,
            base,
            directory.parent if scratch is None else scratch,
        )

    @cached_property
    def _frozen(self) -> Digests:
        """The digests of the frozen weights, which never change. Collective under ZeRO-3."""
        return frozen_digests(self.module)

    @cached_property
    def shard_bytes(self) -> int:
        """About how many bytes this rank writes: trained weights, and of each number an fp32 copy and two moments."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in (*self._trained, *self.module.buffers()))
        trained = sum(full_shape(parameter).numel() for parameter in self._trained)
        return held + 12 * trained // (self.world_size if self.config.zero else 1)

    def _identity(self) -> dict[str, int | str]:
        return {"zero": self.config.zero, "dtype": self.dtype, "ranks": self.world_size}

    def full_state(self, module: nn.Module | None = None) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield whole weights of ``module`` (default: the wrapped one) by their names in memory, one layer at a time.

        Collective under ZeRO-3: every rank must iterate to the end. Rank 0 receives tensors on the CPU, the others empty
        groups.
        """
        yield from map(copied, gathered_groups(self.module if module is None else module, receive=self.rank == 0))

    def disk_weights(self, model: PreTrainedModel | SequenceRegression) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of ``model``, which the wrapped module holds, by the names that they have on disk.

        Collective under ZeRO-3, like :meth:`full_state`, and copied to the CPU like its tensors. This feeds saved directories.
        """
        for group in disk_weights(model, receive=self.rank == 0):
            yield from copied(group)

    def disk_weights_in_place(self, model: PreTrainedModel | SequenceRegression) -> Iterator[tuple[str, Tensor]]:
        """The same weights where they lie, without a copy, for the rollout engines: they change with the next update."""
        for group in disk_weights(model, receive=self.rank == 0):
            yield from group

    def close(self) -> None:
        """Free hooks and memory that DeepSpeed would hold beyond the life of this object."""
        self._end_saving()
        self._watch.remove()
        if self._sums is not None:
            self._sums.remove()
        self._deepspeed.destroy()


def _gather_experts_together(module: nn.Module) -> None:
    """Let ZeRO-3 gather all experts of a layer at once, since which of them a rank uses depends on its tokens."""
    kinds = {type(block) for block in expert_blocks(module)}
    if kinds:
        set_z3_leaf_modules(module, list(kinds))


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place, as DeepSpeed does; buffers keep their precision.

    Parameters in shards were built in ``dtype``. The others beside them (a head, adapters) DeepSpeed would leave as they
    are, and would then fail when it joins the shards of all.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _loss_and_metrics(output: LossOutput) -> tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]]:
    if output.loss.dim() != 0 or not output.loss.requires_grad:
        raise RlhfRayError(
            f"a loss must be one number that depends on the module, but it has shape {tuple(output.loss.shape)} and "
            f"requires_grad {output.loss.requires_grad}"
        )
    metrics = {name: (total.detach(), count.detach()) for name, (total, count) in output.metrics.items()}
    return output.loss, metrics
