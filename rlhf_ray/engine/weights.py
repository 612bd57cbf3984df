"""Whole weights of a model that ZeRO-3 may have split over many ranks, one layer at a time.

Invariants: every parameter and persistent buffer comes exactly once (a tied one under its first name), whole, and in the same
order on every rank. Under ZeRO-3 all ranks walk together, and a group holds the tensors of one layer, so that no more than
one layer is whole at a time. The parts of an adapted layer are in one group. Nothing is copied: weights come where they lie, so
that they change with the model, and what is computed from them (merged adapters, dequantised weights) is computed there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.engine.optimizer import full_shape
from rlhf_ray.models.disk_names import Adapters, to_disk_names
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.adapters import adapter_name
from rlhf_ray.models.weights.held import held_tensors
from rlhf_ray.models.weights.lora import ADAPTED_PARTS, is_adapter_part
from rlhf_ray.models.weights.quantization import dequantized, dequantized_like

Group = list[tuple[str, Tensor]]


def layer_name(name: str) -> str:
    """Return the part of a name in memory up to its first number: its layer.

    Without a number it is the whole name, or the name of the adapted layer that the tensor is a part of.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
        if part in ADAPTED_PARTS:
            return ".".join(parts[:index])
    return name


def layers(module: nn.Module) -> list[list[tuple[str, Tensor]]]:
    """Return the parameters and persistent buffers of ``module``, in lists of neighbours that belong to one layer."""
    return [list(group) for _, group in groupby(held_tensors(module), key=lambda item: layer_name(item[0]))]


def gathered_groups(module: nn.Module, *, receive: bool) -> Iterator[Group]:
    """Walk the layers of ``module``; yield the whole tensors of each where they lie, or an empty list without ``receive``.

    On a GPU use a group before the next one is asked for, or all layers that are held are whole at once.
    """
    for layer in layers(module):
        with _gather([tensor for _, tensor in layer]):
            yield [(name, dequantized(tensor).detach()) for name, tensor in layer] if receive else []


def disk_weights(
    model: PreTrainedModel | SequenceRegression, *, receive: bool, adapters: Adapters = "merged"
) -> Iterator[Group]:
    """Walk the layers of ``model`` as :func:`gathered_groups` does, and give each weight the name it has on disk.

    Adapters are merged, or left out, and 4-bit weights dequantised.
    """
    for group in gathered_groups(model, receive=receive):
        yield list(to_disk_names(model, group, adapters=adapters)) if group else []


def adapter_weights(model: PreTrainedModel, *, receive: bool) -> Iterator[Group]:
    """Walk the layers of ``model`` likewise, and give the tensors of each adapter the names that PEFT gives them on disk."""
    adapters = ((name, tensor) for name, tensor in model.named_parameters() if is_adapter_part(name))
    for _, layer in groupby(adapters, key=lambda item: layer_name(item[0])):
        parts = list(layer)
        with _gather([tensor for _, tensor in parts]):
            yield [(adapter_name(name), tensor.detach()) for name, tensor in parts] if receive else []


class DiskWeight(NamedTuple):
    """What is known of a weight without its numbers."""

    name: str
    """On disk."""
    dtype: torch.dtype
    shape: tuple[int, ...]


def describe_disk_weights(model: PreTrainedModel | SequenceRegression) -> list[DiskWeight]:
    """Return what :func:`disk_weights` yields, in its order, without gathering or computing a weight."""
    described = []
    for layer in layers(model):
        shapes = [(name, _without_numbers(tensor)) for name, tensor in layer]
        for name, tensor in to_disk_names(model, shapes):
            described.append(DiskWeight(name, tensor.dtype, tuple(tensor.shape)))
    return described


def _without_numbers(tensor: Tensor) -> Tensor:
    whole = dequantized_like(tensor)
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta") if whole is None else whole


def _gather(tensors: list[Tensor]) -> contextlib.AbstractContextManager[object]:
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed  # it is loaded already, since only DeepSpeed splits parameters

    context: contextlib.AbstractContextManager[object] = deepspeed.zero.GatheredParameters(sharded)
    return context


def copied(group: Group) -> Group:
    """Return the tensors of ``group`` as contiguous tensors on the CPU, which no longer change with the model."""
    return [(name, tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)) for name, tensor in group]
