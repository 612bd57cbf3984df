"""What an engine and its activations hold on the GPU, against the formulas of ``rlhf_ray.planning.memory``.

Always true: what is measured are bytes that torch's allocator has handed out, without the context of CUDA. Where they are
off by more than the limit the figures are kept all the same. On a CPU, where no allocator counts, storages of live tensors are
counted between updates.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.figures import Figure, Figures
from benchmarks.sequences import ragged_sequences
from rlhf_ray.engine import Engine, destroy_process_group, init_process_group
from rlhf_ray.environment import Device
from rlhf_ray.models import Actor, PackedPolicy
from rlhf_ray.planning.memory import Part, Phase, activation_parts, engine_parts, head_parts
from rlhf_ray.planning.model_size import ModelSize
from rlhf_ray.trajectories import TrajectoryBatch, pack
from tests.gpu.checks import FoundWrong
from tests.gpu.engines import engine_config, loss
from tests.gpu.shapes import SHAPES, make
from tests.gpu.sizes import Sizes
from tests.gpu.throughput import reset_peak

REST_LIMIT, PEAK_LIMIT = 0.05, 0.15
"""How far what is held between updates, and at most during one, may be from the formula, as a share of it."""
SMALLEST = 4096
"""Bytes of a storage that is counted on a CPU."""


@dataclass(frozen=True)
class Held:
    """Bytes between updates and at most during one (None where nobody counts)."""

    rest: float
    peak: float | None


def memory_follows_formulas(device: Device, sizes: Sizes, *, zero: int) -> Figures:
    """A policy of the small shape in bf16 on one rank, in its second update."""
    init_process_group(0, 1, None, device=torch.device(device))
    held, stated = _update(device, sizes, zero)
    destroy_process_group()
    name, method = f"gpu.memory.{sizes.small}.zero{zero}", f"policy of {sizes.small}, bf16, one rank at ZeRO {zero}"
    figures: Figures = {}
    wrong = []
    for moment, found, limit in (("rest", held.rest, REST_LIMIT), ("peak", held.peak, PEAK_LIMIT)):
        if found is None:
            continue
        expected = getattr(stated, moment)
        figures[f"{name}.{moment}"] = Figure(found / 1e9, "GB", False, method)
        figures[f"{name}.{moment}_to_formula"] = Figure(found / expected, "ratio", False, f"{method}, over the formula")
        if not abs(found / expected - 1) <= limit:
            wrong.append(f"{moment} {found / 1e9:.2f} GB, by the formula {expected / 1e9:.2f} GB (limit {limit:.0%})")
    if wrong:
        raise FoundWrong("; ".join(wrong), figures)
    return figures


def _update(device: Device, sizes: Sizes, zero: int) -> tuple[Held, Held]:
    sequences = ragged_sequences(sizes.memory_sequences, int(SHAPES[sizes.small]["vocab_size"]))
    packed = pack(TrajectoryBatch.from_sequences(sequences)).to(device)
    gc.collect()
    before = _now(device)
    model = make(sizes.small, device)
    engine = Engine(
        PackedPolicy(Actor(model, attn_implementation="auto")),
        engine_config(zero),
        dtype="bf16",
        total_updates=None,
        trainable=True,
    )
    size = size_of(model)
    for _ in range(2):  # the first makes the moments of the optimizer
        gc.collect()
        reset_peak(device)
        engine.accumulate([packed], loss, float(packed.num_tokens))
        engine.apply(skip=False)
    gc.collect()
    highest = None if device == "cpu" else torch.cuda.max_memory_allocated() - before
    held = Held(_now(device) - before, highest)
    parts = list(engine_parts(size, engine.config, "bf16", 1))
    parts += activation_parts(size, "bf16", training=packed.num_tokens, forward=0, checkpointing=False)
    parts += head_parts(size, "bf16", trains=True)
    engine.close()
    return held, Held(_stated(parts, "rest"), max(_stated(parts, phase) for phase in ("backward", "reduce", "step")))


def _stated(parts: list[Part], phase: Phase) -> float:
    return sum(part.bytes for part in parts if part.where == "GPU" and phase in part.phases)


def size_of(model: PreTrainedModel) -> ModelSize:
    """Counts of a causal language model of this package's shapes."""
    config, counts = model.config, [(getattr(p, "ds_shape", p.shape), p) for p in model.parameters()]
    numbers = [(len(shape), shape.numel()) for shape, _ in counts]
    return ModelSize(
        numbers=sum(count for _, count in numbers),
        trained=sum(count for _, count in numbers),
        four_bit=0,
        vectors=sum(count for dimensions, count in numbers if dimensions < 2),
        largest=max(count for _, count in numbers),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        width=config.intermediate_size,
        query=config.num_attention_heads * config.head_dim,
        key_value=config.num_key_value_heads * config.head_dim,
        vocabulary=config.vocab_size,
        normed_heads=config.model_type == "qwen3",
    )


def _now(device: Device) -> int:
    """Bytes that are held now."""
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    tensors: list[Tensor] = []
    for thing in gc.get_objects():
        try:
            if isinstance(thing, Tensor) and thing.device.type == "cpu":
                tensors += [thing] if thing.grad is None else [thing, thing.grad]
        except ReferenceError:  # a weak one to what is gone
            continue
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for size in storages.values() if size >= SMALLEST)
