"""The memory of one rank, part by part: on its GPU, and on the host that the GPU is in.

Invariants: every part says where it lies and during what; a peak is the largest sum of the parts that are there together. The
parts of an engine (weights, optimizer, gradients, buckets) agree within 5 % with the storages that DeepSpeed 0.19 holds on
CPU, which ``make test`` counts at every ZeRO stage; activations agree with what autograd keeps. What only a GPU has (the CUDA
context, pinned blocks, the buffers of vLLM) follows from sources and has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.config.sections.models import Dtype
from rlhf_ray.planning.checkpoints import MASTER, MOMENTS
from rlhf_ray.planning.model_size import ModelSize

Where = Literal["GPU", "host"]
Phase = Literal["rest", "score", "backward", "reduce", "step", "publish"]
"""``rest``: between calls. ``score``: a forward pass without gradients. ``backward``: the last micro-batch of an update, with
all gradients. ``reduce``: summed gradients on their way to the rank that updates them. ``step``: the step of the optimizer.
``publish``: weights on their way to the rollout engines."""
ALWAYS: tuple[Phase, ...] = get_args(Phase)
UPDATE: tuple[Phase, ...] = ("backward", "reduce", "step")

BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32 = 4
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number in NF4 with double quantisation: four bits, and a byte of scale for 64 numbers, scaled by fp32 in turn."""
BUCKET = 50_000_000
"""Numbers in DeepSpeed's buffer of gradients on their way to other ranks: ``reduce_bucket_size``, as the engine sets it."""
LIVE = 1_000_000_000
"""Numbers of whole weights that ZeRO-3 keeps at once, where two layers are fewer: ``stage3_max_live_parameters``."""
SUB_GROUP = 1_000_000_000
"""Numbers that the optimizer of ZeRO-3 updates at once: DeepSpeed's ``sub_group_size``."""
KEPT_PROBABILITIES = 1 << 27
"""Most bytes of probabilities that a forward pass on a CPU keeps for its backward: ``KEPT_BYTES`` of the model's head."""
CONTEXT = 800_000_000
"""Bytes that CUDA, cuBLAS and NCCL take of a GPU in each process. An assumption, to be measured on a GPU."""
PROCESS = 3_000_000_000
"""Bytes of host memory of a process with torch and CUDA in it. An assumption, to be measured on a GPU."""


@dataclass(frozen=True)
class Part:
    """Bytes of one kind that a rank holds during some phases."""

    what: str
    where: Where
    bytes: float
    phases: tuple[Phase, ...] = ALWAYS


def peak(parts: Iterable[Part], where: Where) -> tuple[Phase, list[Part]]:
    """The phase in which most of ``where`` is taken, and what is there then; the first of equal ones."""
    parts = [part for part in parts if part.where == where]
    phase = max(ALWAYS, key=lambda one: sum(part.bytes for part in parts if one in part.phases))
    return phase, [part for part in parts if phase in part.phases]


def total(parts: Iterable[Part], where: Where) -> float:
    """Bytes of ``where`` at the peak."""
    return sum(part.bytes for part in peak(parts, where)[1])


def engine_parts(size: ModelSize, engine: EngineConfig, dtype: Dtype, ranks: int) -> Iterator[Part]:
    """What DeepSpeed holds of a model on one of ``ranks`` ranks: weights, optimizer, gradients, buckets.

    Bytes that are split are those of an even split. A model of a rank without GPU has all of it on the host.
    """
    sharded, each = engine.zero == 3, BYTES[dtype]
    whole = (size.numbers - size.four_bit) * each + size.four_bit * FOUR_BIT
    if sharded:
        vectors = size.vectors * each  # whole on every rank, and in shards too
        yield Part("weights", "host" if engine.offload == "all" else "GPU", whole / ranks + vectors)
        live = max(LIVE, 2 * size.numbers // max(1, size.layers))
        gathered = min(size.numbers, live + size.largest) * each if ranks > 1 else 0  # a lone rank's shard is whole
        yield Part("gathered weights", "GPU", gathered, ("score", "backward"))
    else:
        yield Part("weights", "GPU", whole)
    if size.trained:
        yield from _optimizer_parts(size.trained, engine, dtype, ranks)
        yield from _gradient_parts(size, engine, dtype, ranks)


def _optimizer_parts(trained: int, engine: EngineConfig, dtype: Dtype, ranks: int) -> Iterator[Part]:
    share = trained / ranks if engine.zero else trained
    host = engine.offload != "none"
    master = 0 if dtype == "fp32" and engine.zero == 0 else MASTER
    if not host:
        yield Part("optimizer", "GPU", share * (master + MOMENTS))
        return
    if engine.zero == 3:
        yield Part("optimizer", "host", share * (master + MOMENTS))
        return
    # The master and a copy of the updated weights, from which they go to the GPU, lie in pinned blocks.
    yield Part("optimizer", "host", share * MOMENTS + pinned(share * master) + pinned(share * BYTES[dtype]))


def _gradient_parts(size: ModelSize, engine: EngineConfig, dtype: Dtype, ranks: int) -> Iterator[Part]:
    zero, each, trained = engine.zero, BYTES[dtype], size.trained
    share, bucket, low = trained / ranks, BUCKET * each, dtype != "fp32"
    if zero == 0:
        yield Part("gradients", "GPU", trained * FP32, ("backward", "reduce"))
        # The sums in fp32 are rounded for DeepSpeed, which makes them fp32 again.
        yield Part("gradients", "GPU", trained * (FP32 + each if low else FP32), ("step",))
        return
    if engine.offload != "none":
        yield from _offloaded_gradient_parts(size, engine, dtype, ranks)
        return
    if zero == 1:
        yield Part("gradients", "GPU", trained * FP32, ("backward",))
        yield Part("gradients", "GPU", trained * each + share * FP32, ("reduce",))
        yield Part("gradients", "GPU", share * FP32, ("step",))
        yield Part("bucket", "GPU", bucket, ("backward", "reduce"))
    elif zero == 2:
        yield Part("gradients", "GPU", share * FP32, UPDATE)
        yield Part("bucket", "GPU", bucket, ("backward",))
    else:
        yield Part("gradients", "GPU", share * FP32)
        yield Part("bucket", "GPU", bucket)
        yield Part("gradients of a sub-group", "GPU", min(share, SUB_GROUP) * FP32, ("step",))


def _offloaded_gradient_parts(size: ModelSize, engine: EngineConfig, dtype: Dtype, ranks: int) -> Iterator[Part]:
    """Gradients of an engine whose optimizer lies on the host: what waits there for the step is pinned."""
    each, share, low = BYTES[dtype], size.trained / ranks, dtype != "fp32"
    if engine.zero == 3:
        sub_groups = pinned(min(share, SUB_GROUP) * FP32) * max(1, round(share / SUB_GROUP))
        yield Part("gradients", "host", pinned(share * FP32) + sub_groups)
        yield Part("bucket", "GPU", BUCKET * each)
        return
    yield Part("gradients", "host", pinned(share * FP32) + pinned(size.largest * each))
    yield Part("bucket", "GPU", size.largest * each)
    if engine.zero == 1:
        yield Part("gradients", "GPU", size.trained * FP32, ("backward",))
        yield Part("gradients", "GPU", size.trained * each, ("reduce",))
        yield Part("bucket", "GPU", BUCKET * each, ("backward", "reduce"))
        return
    # In bf16 DeepSpeed adds micro-batches on the GPU, in fp32 in pinned blocks of the host that it keeps.
    yield Part("gradients", "GPU", share * FP32, UPDATE) if low else Part("gradients", "host", pinned(share * FP32))
    yield Part("bucket", "GPU", BUCKET * each, ("backward",))


def activation_parts(
    size: ModelSize, dtype: Dtype, *, training: int, forward: int, checkpointing: bool
) -> Iterator[Part]:
    """Activations of micro-batches of ``training`` tokens with gradients (0 for a frozen model), and of ``forward`` without.

    A layer keeps for its backward pass the inputs of its norms in fp32, their outputs, queries, keys, values, the output of
    attention, and the four products of the MLP. With gradient checkpointing only its input is kept, and one layer is there at
    a time. Attention is that of a kernel which never holds its scores.
    """
    each = BYTES[dtype]
    layer = kept_by_layer(size, dtype)
    working = (3 * size.width + 2 * size.hidden) * each  # the gradients of the products, or the products themselves
    if training:
        ends = (FP32 + 2 * each) * size.hidden
        kept = size.layers * size.hidden * each + layer if checkpointing else size.layers * layer
        yield Part("activations", "GPU", training * (kept + ends + working), ("backward",))
    yield Part("activations", "GPU", forward * ((FP32 + 2 * each) * size.hidden + working), ("score",))


def kept_by_layer(size: ModelSize, dtype: Dtype) -> int:
    """Bytes of a token that a layer without checkpointing keeps for its backward pass."""
    each = BYTES[dtype]
    norm = (FP32 if each < FP32 else 0) + 2 * each
    heads = 2 * each * (size.query + size.key_value)
    if size.normed_heads:
        heads += (norm - each) * (size.query + size.key_value)
    return 2 * norm * size.hidden + heads + 4 * each * size.width


def head_parts(size: ModelSize, dtype: Dtype, *, trains: bool) -> Iterator[Part]:
    """The logits of one chunk of tokens and, in a backward pass, the gradient of the output layer.

    Logits become log-probabilities in place; entropies, which training reports, take a second copy, and in half precision so
    does their gradient. None for a model with a score head.
    """
    if not size.vocabulary:
        return
    chunk, each = tokens_of_a_chunk(size.vocabulary) * size.vocabulary, BYTES[dtype]
    yield Part("logits", "GPU", chunk * FP32, ("score",))
    if trains:
        frozen = size.trained < size.frozen  # then the output layer has no gradient
        gradient = 0 if frozen else size.vocabulary * size.hidden * (FP32 + (each if each < FP32 else 0))
        narrow = each if each < FP32 else 0
        yield Part("logits", "GPU", max(2 * chunk * FP32, chunk * (FP32 + narrow) + gradient), ("backward",))


def kept_parts(size: ModelSize, dtype: Dtype, *, training: int) -> Iterator[Part]:
    """Probabilities that a model on a CPU keeps of a micro-batch of at most ``training`` tokens, instead of logits twice.

    A micro-batch that would need more than the bound keeps none, but a smaller one may. None for a score head. Not for a
    model whose loss depends on entropies, which keeps none.
    """
    kept = min(KEPT_PROBABILITIES, training * size.vocabulary * BYTES[dtype])
    if kept:
        yield Part("probabilities", "GPU", kept, ("backward",))


def tokens_of_a_chunk(vocabulary: int) -> int:
    """Tokens whose logits are held at once on a GPU."""
    return 8 * max(128, (1 << 20) // vocabulary)


def pinned(count: float) -> float:
    """Bytes that torch takes for a pinned block of ``count`` bytes: the next power of two, by default without a bound."""
    return float(1 << (int(count) - 1).bit_length()) if count >= 1 else 0.0


def cache_of_a_token(size: ModelSize, dtype: Dtype, tensor_parallel: int) -> float:
    """Bytes of the KV cache that a token takes on each of the GPUs of a rollout engine.

    Engines with more GPUs than a layer has heads of keys hold each head more than once.
    """
    return 2.0 * size.layers * size.key_value * BYTES[dtype] / min(tensor_parallel, size.key_value_heads)


def sampling_parts(
    size: ModelSize, dtype: Dtype, *, tensor_parallel: int, tokens: int, longest: int, sequences: int
) -> Iterator[Part]:
    """The least that a rollout engine needs on each of its GPUs: its cache holds one sequence of the ``longest`` length.

    ``tokens`` is how many it reads at once, ``sequences`` of how many it holds logits.
    """
    each = BYTES[dtype]
    yield Part("weights", "GPU", size.numbers * each / tensor_parallel)
    yield Part("activations", "GPU", tokens * (3 * size.width / tensor_parallel + 4 * size.hidden) * each)
    yield Part("logits", "GPU", 3.0 * sequences * size.vocabulary * FP32)
    yield Part("KV cache", "GPU", longest * cache_of_a_token(size, dtype, tensor_parallel))
