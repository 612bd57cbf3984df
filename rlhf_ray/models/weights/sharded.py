"""Build a model for ZeRO-3, where each rank holds a shard of every parameter, tensor by tensor from safetensors.

Invariants: no rank ever holds more than one module's own parameters whole. Every weight came from the checkpoint, which this
module checks itself, and rank 0 alone reads it: the files of a large model are read once, however many ranks there are. What a
checkpoint lacks is the same error on every rank, since all read the shapes. Buffers (rotary frequencies) keep their precision.

The usual ways do not work: transformers loads all weights on every rank, and DeepSpeed's ``zero.Init`` around a constructor
casts what the constructor computes. So the modules are built empty here, and each is filled and handed to ``zero.Init`` by
itself. All are filled in one workspace, whose content on rank 0 ``zero.Init`` sends to the others and from which it copies this
rank's share: memory that is allocated and freed again for each would stay with the process in pieces. Some parameters lie on
disk in parts (the experts of a mixture). Then transformers is asked which rows belong to which part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_ray.console import progress
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.held import held_tensors

SOURCE = 0
"""The rank whose weights ``zero.Init`` and :func:`made_whole` send to the others."""


def wants_shards(ds_config: Mapping[str, Any] | None) -> bool:
    """Return whether a DeepSpeed configuration asks for ZeRO-3."""
    return ds_config is not None and ds_config.get("zero_optimization", {}).get("stage") == 3


@dataclass(frozen=True)
class Part:
    """A tensor on disk, and which rows of a parameter in memory it holds (None: it is the whole parameter)."""

    name: str
    rows: Tensor | None


def load_in_shards(
    auto: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    ds_config: Mapping[str, Any],
    *,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Do what ``load_weights`` does, on all ranks together; torch.distributed must be initialised.

    ``auto`` is one of transformers' ``AutoModel`` classes, whose ``from_config`` has no types. The workspace lies on
    ``device``, by default on the CPU. On a GPU this has not run yet.
    """
    from accelerate import init_empty_weights
    from deepspeed import zero

    config = checkpoint.config(trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    parts, named = _parts(checkpoint, model), {id(tensor): name for name, tensor in model.named_parameters()}
    owners = list(model.named_modules())[::-1]  # children first: zero.Init also splits the parameters of children
    workspace = torch.empty(max(_own_size(owner) for _, owner in owners), dtype=dtype, device=device)
    reads = dist.get_rank() == SOURCE
    filled: dict[int, nn.Parameter] = {}
    for path, owner in progress(owners, f"building {checkpoint.directory.name} in shards"):
        for name, buffer in owner.named_buffers(recurse=False):
            if _join(path, name) in parts:  # the others are not on disk
                _fill(buffer, checkpoint, parts[_join(path, name)])
        used = 0
        for name, empty in list(owner.named_parameters(recurse=False)):
            if id(empty) not in filled:
                weight = workspace[used : used + empty.numel()].view(empty.shape)
                if reads:
                    _fill(weight, checkpoint, parts[named[id(empty)]])
                filled[id(empty)] = nn.Parameter(weight, requires_grad=empty.requires_grad)
                used += empty.numel()
            setattr(owner, name, filled[id(empty)])
        if used:
            zero.Init(module=owner, config_dict_or_path=dict(ds_config))
    return model


def grow_rows(embedding: nn.Embedding, added: Callable[[Tensor], Tensor], ds_config: Mapping[str, Any]) -> None:
    """Append the rows that ``added`` computes from the old ones to an embedding in shards, on all ranks together."""
    from deepspeed import zero

    with zero.GatheredParameters([embedding.weight]):
        old = embedding.weight.detach()
        weight = nn.Parameter(torch.cat([old, added(old).to(old)]), requires_grad=embedding.weight.requires_grad)
    embedding.weight, embedding.num_embeddings = weight, len(weight)
    zero.Init(module=embedding, config_dict_or_path=dict(ds_config))


def made_whole(tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Make parameters whole while all ranks change them in the same way; those that lie in no shards are whole already."""
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not sharded:
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[object] = zero.GatheredParameters(sharded, modifier_rank=SOURCE)
    return context


def is_sent(tensor: Tensor) -> bool:
    """Whether what this rank writes into ``tensor`` is lost, since inside :func:`made_whole` another rank sends its own."""
    return hasattr(tensor, "ds_id") and dist.get_rank() != SOURCE


def _parts(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, list[Part]]:
    """Find the tensors on disk of every parameter and persistent buffer; tied parameters count as one."""
    layout = _layout(model, dict(held_tensors(model)))
    lacking = [part.name for parts in layout.values() for part in parts if not _spelling(checkpoint, model, part.name)]
    if lacking:
        raise ModelLoadError(
            f"{checkpoint.directory} does not hold the weights of a {type(model).__name__}: it has no {lacking[0]}"
            + (f" and {len(lacking) - 1} others" if len(lacking) > 1 else "")
            + ". It is another kind of model"
        )
    found = {
        live: [Part(_spelling(checkpoint, model, part.name), part.rows) for part in parts]
        for live, parts in layout.items()
    }
    shapes = checkpoint.shapes()
    for live, tensor in held_tensors(model):
        if live in found:
            _check_parts(tensor, checkpoint, found[live], shapes)
    return found


def _check_parts(
    weight: Tensor, checkpoint: Checkpoint, parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse parts that do not make up the whole of a parameter or buffer."""
    numbers = 0
    for part in parts:
        # One that the index names and its file lacks is an error of the second look.
        shape, expected = shapes.get(part.name) or checkpoint.shape(part.name), _shape(weight, part)
        if shape != expected:
            raise ModelLoadError(
                f"{part.name} in {checkpoint.directory} has shape {shape}, but its config says {expected}"
            )
        numbers += prod(shape)
    if numbers != weight.numel():
        raise ModelLoadError(
            f"{checkpoint.directory} cannot be built in shards, since its parts do not make up a whole weight: use ZeRO "
            "stage 2 or less"
        )


def _shape(weight: Tensor, part: Part) -> tuple[int, ...]:
    return tuple(weight.shape if part.rows is None else part.rows.shape + _width(weight))


def _width(weight: Tensor) -> torch.Size:
    return weight.shape[-1:] if weight.dim() > 1 else torch.Size()


def _layout(model: PreTrainedModel, held: Mapping[str, Tensor]) -> dict[str, list[Part]]:
    """Find which tensors on disk make up each parameter and each persistent buffer.

    Every row of each gets a number, and transformers converts tensors of these numbers to their form on disk as it
    would convert the weights. The tensors are two wide, since transformers drops dimensions of size one.
    """
    numbered, first, names = {}, [0], list(held)
    for name in names:
        shape = held[name].shape
        lead = shape[:-1] if len(shape) > 1 else shape
        numbers = torch.arange(first[-1], first[-1] + lead.numel()).view(lead)
        numbered[name] = torch.stack([numbers, numbers], -1) if len(shape) > 1 else numbers
        first.append(first[-1] + lead.numel())
    starts = torch.tensor(first)
    layout: dict[str, list[Part]] = {name: [] for name in names}
    for disk, numbers in revert_weight_conversion(model, numbered).items():
        index = int(torch.searchsorted(starts, numbers.flatten()[0], right=True)) - 1
        name = names[index]
        rows = numbers[..., 0] - first[index] if len(held[name].shape) > 1 else numbers - first[index]
        layout[name].append(Part(disk, None if torch.equal(numbers, numbered[name]) else rows))
    return layout


def _spelling(checkpoint: Checkpoint, model: PreTrainedModel, name: str) -> str:
    """Return the name in the checkpoint, which may have the prefix of the base model or lack it; empty if there is none."""
    prefix = f"{model.base_model_prefix}."
    return next((s for s in (name, prefix + name, name.removeprefix(prefix)) if s in checkpoint.names), "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _own_size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _fill(weight: Tensor, checkpoint: Checkpoint, parts: list[Part]) -> None:
    """Fill a parameter or buffer from its parts, with one part in memory at a time."""
    for part in parts:
        tensor = checkpoint.read(part.name)
        if part.rows is None:
            weight.copy_(tensor)
        else:
            width = _width(weight)
            rows = part.rows.flatten().to(weight.device)
            weight.view(-1, *width)[rows] = tensor.reshape(-1, *width).to(weight)
