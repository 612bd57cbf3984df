"""Whole weights of a model that ZeRO-3 may have split over many ranks, one layer at a time.

Invariants: every parameter comes exactly once (a tied one under its first name), whole, and in the same order on every
rank. Under ZeRO-3 all ranks walk together, and a group holds the parameters of one layer, so that no more than one layer
is whole at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.quantization import dequantized

Group = list[tuple[str, Tensor]]


def layer_name(name: str) -> str:
    """Return the part of a name in memory up to its first number: its layer. Without a number it is the whole name."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return name


def layers(module: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Return the parameters of ``module`` with their names, in lists of neighbours that belong to one layer."""
    named = list(module.named_parameters())
    return [list(group) for _, group in groupby(named, key=lambda item: layer_name(item[0]))]


def gathered_groups(module: nn.Module, *, receive: bool) -> Iterator[Group]:
    """Walk the layers of ``module``; yield the whole tensors of each on the CPU, or an empty list without ``receive``."""
    for layer in layers(module):
        with _gather([parameter for _, parameter in layer]):
            group = [(name, _copy(parameter)) for name, parameter in layer] if receive else []
        yield group


def disk_weights(model: PreTrainedModel | SequenceRegression, *, receive: bool) -> Iterator[Group]:
    """Walk the layers of ``model`` as :func:`gathered_groups` does, and give each weight the name it has on disk.

    Adapters are merged and 4-bit weights dequantised.
    """
    for group in gathered_groups(model, receive=receive):
        yield list(to_disk_names(model, group)) if group else []


def _gather(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed  # it is loaded already, since only DeepSpeed splits parameters

    context: contextlib.AbstractContextManager[object] = deepspeed.zero.GatheredParameters(sharded)
    return context


def _copy(parameter: nn.Parameter) -> Tensor:
    return dequantized(parameter).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
