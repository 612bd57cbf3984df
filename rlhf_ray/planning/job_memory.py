"""The memory of a whole job: of every role on each of its GPUs and on the host, and of Ray's object store.

Invariants: a rank may take of its GPU the share that it is placed on (``gpus_per_rank``, and of a rollout engine
``gpu_memory_utilization``), so a GPU is large enough for a job if it is for each role alone. Roles that take turns on a GPU
(``cluster.colocate``) may each take all of it; ``planning/colocation`` adds up who is there together. What a model's files do
not tell is said to be unknown, and refuses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_ray.config.facts import Role, Sampling
from rlhf_ray.config.files.models import adapter_base, is_adapter
from rlhf_ray.config.files.score_heads import Shape
from rlhf_ray.config.jobs.base import Job, TrainingJob
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import table
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning.checkpoints import copied_bytes, shapes_of
from rlhf_ray.planning.memory import (
    BYTES,
    CONTEXT,
    PROCESS,
    Part,
    activation_parts,
    cache_of_a_token,
    engine_parts,
    head_parts,
    kept_parts,
    peak,
    sampling_parts,
    total,
)
from rlhf_ray.planning.model_size import ModelSize, located, model_size

GB = 1e9
READ_AT_ONCE, SAMPLED_AT_ONCE = 8192, 256
"""Tokens that a rollout engine reads at once, and sequences of which it holds logits, where the least it needs is counted."""
Files = Callable[[ModelConfig], tuple[ModelConfig, Mapping[str, Shape]]]
"""Where a model's files are on this machine, as its section with that path, and the names and shapes of its weights."""


def weights_here(model: ModelConfig) -> tuple[ModelConfig, Mapping[str, Shape]]:
    """The files of a model, at its path or in the cache of the hub; no shapes where its weights are not here.

    An adapter's are added to those of its base.
    """
    found = located(model)
    if found.path is None or not is_adapter(Path(found.path)):
        return found, shapes_of(found)
    base = adapter_base(Path(found.path))
    whole = shapes_of(located(found.model_copy(update={"path": base, "revision": None}))) if base is not None else {}
    adapters = {name: shape for name, shape in shapes_of(found).items() if ".lora_" in name}
    return found, whole | adapters if whole else {}


@dataclass(frozen=True)
class RoleMemory:
    """What one rank of a role, or one GPU of a rollout engine, holds."""

    role: str
    ranks: int
    """Ranks, or GPUs of all rollout engines together."""
    share: float
    """The share of a GPU that it may take; 0 on CPU, where all of it is host memory."""
    share_key: str
    """The key of that share."""
    parts: tuple[Part, ...]
    """Empty where the size of the model is not known."""
    model: str
    cache_token: float = 0.0
    """Of a rollout engine: bytes of the KV cache that a token takes on each of its GPUs."""

    @property
    def gpu(self) -> float:
        """Bytes of GPU memory at the peak."""
        return total(self.parts, "GPU") if self.share else 0.0

    @property
    def host(self) -> float:
        """Bytes of host memory at the peak."""
        return total(self.parts, "host") + (0.0 if self.share else total(self.parts, "GPU"))

    @property
    def gpu_needed(self) -> float:
        """Bytes that a GPU must have, so that the share of it holds the peak."""
        return self.gpu / self.share if self.share else 0.0


def job_memory(config: Job, files: Files = weights_here) -> list[RoleMemory]:
    """The memory of every role, in the order of its placement."""
    roles = [_role_memory(config, name, role, files) for name, role in config.roles().items()]
    sampling = config.sampling()
    return roles if sampling is None else [*roles, _engine_memory(config, sampling, files)]


def _share(config: Job, resources: ResourcesConfig) -> float:
    """The share of a GPU that a rank may take: all of it by turns, else what it is placed on."""
    taking_turns = config.cluster.colocate and resources.gpus_per_rank > 0
    return 1.0 if taking_turns else min(1.0, resources.gpus_per_rank)


def _role_memory(config: Job, name: str, role: Role, files: Files) -> RoleMemory:
    section, model = role.config, role.config.model
    share = _share(config, section.resources)
    size = role_size(role, files)
    parts: list[Part] = []
    if size is not None:
        budget = role.work.budget() if role.work is not None else None
        longest = config.longest_sequence()
        training = 0 if not role.trained or budget is None else section.training_tokens(budget)
        forward = longest if budget is None else section.forward_tokens(budget)
        parts += engine_parts(size, section.engine, model.dtype, section.ranks)
        parts += activation_parts(
            size, model.dtype, training=training, forward=forward, checkpointing=model.gradient_checkpointing
        )
        parts += head_parts(size, model.dtype, trains=role.trained)
        if not share and not role.entropy_in_loss:
            parts += kept_parts(size, model.dtype, training=training)
        sampling = config.sampling()
        if sampling is not None and sampling.role.config is section:
            parts += _last_weights(sampling, size)
        if role.trained:
            parts += _checkpoint(config, role, size)
        if role.beside is not None:
            parts += _teacher(role, role.beside, files)
        parts += _process(share)
    ranks = next((placed.count for placed in config.placements() if placed.name == name), section.ranks)
    return RoleMemory(name, ranks, share, f"{name}.resources.gpus_per_rank", tuple(parts), _name(model))


def _engine_memory(config: Job, sampling: Sampling, files: Files) -> RoleMemory:
    rollout = sampling.config
    on_gpu = rollout.resources.gpus_per_rank > 0
    most = (
        1.0 if rollout.sleep else _share(config, rollout.resources)
    )  # one that sleeps may have more while it is awake
    share = min(rollout.gpu_memory_utilization, most) if on_gpu else 0.0
    size, cache_token, parts = published_size(sampling, files), 0.0, list[Part]()
    if size is not None:
        cache_token = cache_of_a_token(size, rollout.dtype, rollout.tensor_parallel)
        parts += sampling_parts(
            size, rollout.dtype, tensor_parallel=rollout.tensor_parallel,
            tokens=rollout.max_num_batched_tokens or READ_AT_ONCE,
            longest=rollout.max_model_tokens, sequences=rollout.max_num_seqs or SAMPLED_AT_ONCE,
        )  # fmt: skip
        if not on_gpu:
            parts = [part for part in parts if part.what != "KV cache"]
            parts.append(Part("KV cache", "GPU", rollout.kv_cache_gib * 2**30))
        parts += _last_weights(sampling, size)
        parts += _process(share)
    key = (
        "rollout.gpu_memory_utilization"
        if share == rollout.gpu_memory_utilization
        else "rollout.resources.gpus_per_rank"
    )
    ranks = rollout.engines * rollout.tensor_parallel
    return RoleMemory("rollout", ranks, share, key, tuple(parts), _name(sampling.role.config.model), cache_token)


def _teacher(role: Role, teacher: ModelConfig, files: Files) -> Iterator[Part]:
    """The weights of a frozen model that each rank holds whole."""
    size = role_size(Role(role.config.model_copy(update={"model": teacher}), head=False), files)
    if size is not None:
        whole = role.config.engine.model_copy(update={"zero": 0, "offload": "none"})
        yield from (
            replace(part, what=f"teacher's {part.what}") for part in engine_parts(size, whole, teacher.dtype, 1)
        )


def _checkpoint(config: Job, role: Role, size: ModelSize) -> Iterator[Part]:
    """The copy of the state that a rank writes while the next steps run."""
    if isinstance(config, TrainingJob) and config.checkpoint.background:
        yield Part("checkpoint to write", "host", copied_bytes(role, size.trained))


def _last_weights(sampling: Sampling, size: ModelSize) -> Iterator[Part]:
    """What a delta is made from and applied to; of the ranks of the policy the first alone has it."""
    if sampling.config.weight_delta:
        yield Part("last weights", "host", size.numbers * BYTES[sampling.role.config.model.dtype])


def _process(share: float) -> Iterator[Part]:
    if share:
        yield Part("CUDA context", "GPU", CONTEXT)
    yield Part("process", "host", PROCESS if share else PROCESS / 6)


def _name(model: ModelConfig) -> str:
    return model.path or "the made model"


def published_size(sampling: Sampling, files: Files = weights_here) -> ModelSize | None:
    """The size of what engines sample from: the model with its adapters merged."""
    section = sampling.role.config
    merged = section.model.model_copy(update={"lora": None, "quantization": None})
    return role_size(Role(section.model_copy(update={"model": merged}), head=False), files)


def role_size(role: Role, files: Files = weights_here) -> ModelSize | None:
    """The size of a role's model; None where its files are not on this machine."""
    found, shapes = files(role.config.model)
    return model_size(replace(role, config=role.config.model_copy(update={"model": found})), shapes)


def gpu_needed(memory: list[RoleMemory]) -> float:
    """Bytes that every GPU of the job must have, as far as the sizes of its models are known."""
    return max((one.gpu_needed for one in memory), default=0.0)


def require_memory(memory: list[RoleMemory], gpu_bytes: float) -> None:
    """Raise :class:`CapacityError`, with the numbers of each role that its share of a GPU of ``gpu_bytes`` does not hold."""
    short = [one for one in memory if one.gpu > one.share * gpu_bytes]
    if short:
        raise CapacityError(f"the job does not fit: {'; '.join(_shortage(one, gpu_bytes) for one in short)}")


def _shortage(one: RoleMemory, gpu_bytes: float) -> str:
    phase, parts = peak(one.parts, "GPU")
    largest = sorted(parts, key=lambda part: -part.bytes)[:3]
    named = ", ".join(f"{part.what} {part.bytes / GB:.1f}" for part in largest)
    ways = "raise it, take larger GPUs"
    if one.role != "rollout":
        ways += f", raise {one.role}.ranks with engine.zero 3, or lower max_tokens_per_micro_batch"
    else:
        ways += ", or raise rollout.tensor_parallel"
    return (
        f"a rank of {one.role} needs {one.gpu / GB:.1f} GB of its GPU ({phase}: {named}), but {one.share_key} "
        f"{one.share:g} of {gpu_bytes / GB:.0f} GB is {one.share * gpu_bytes / GB:.1f} GB: {ways}"
    )


def memory_table(memory: list[RoleMemory], store: int | None, needed: float | None = None) -> str:
    """The memory of every role by part, at its peak, and what a GPU must have; computed, not measured.

    ``store`` is how many bytes the object store must have; None where that is not known. ``needed`` is what a GPU must have
    where that does not follow from each role alone.
    """
    rows = [row for one in memory for row in _rows(one)]
    stated = "not known yet" if store is None else _gb(store)
    rows.append(("object store", "", "on the node of the policy and of each engine", "", "", stated))
    needed = gpu_needed(memory) if needed is None else needed
    if needed:
        rows.append(("every GPU", "", "must have", "", f"{needed / GB:.0f}", ""))
    headers = ("role", "ranks", "part of a rank at its peak", "GPU GB", "GPU needed GB", "host GB")
    return table("memory, computed from shapes", headers, rows)


def _rows(one: RoleMemory) -> Iterator[tuple[str, ...]]:
    if not one.parts:
        yield one.role, str(one.ranks), f"not known yet: {one.model} is not on this machine", "", "", ""
        return
    needed = f"{one.gpu_needed / GB:.0f} ({one.gpu / GB:.1f} / {one.share:g})" if one.share else ""
    gpu_phase, gpu = peak(one.parts, "GPU")
    host = peak(one.parts, "host")[1]
    yield one.role, str(one.ranks), f"in all ({gpu_phase})", _gb(one.gpu), needed, _gb(one.host)
    for part in gpu:
        on_gpu = bool(one.share)
        yield "", "", part.what, _gb(part.bytes) if on_gpu else "", "", "" if on_gpu else _gb(part.bytes)
    for part in host:
        yield "", "", f"{part.what} (host)", "", "", _gb(part.bytes)


def _gb(count: float) -> str:
    return f"{count / GB:.1f}" if count >= 0.05 * GB else "0" if count == 0 else "< 0.1"
