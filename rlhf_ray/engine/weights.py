"""Whole weights of a model that may lie in parts on many ranks, and as they are written and sent.

Always true: every parameter comes exactly once (a tied one under its first name), whole, and in the same order on every
rank; under ZeRO-3 all ranks walk together, and a group holds the parameters of one layer, so that never more than one
layer is whole at a time; a weight is dequantised and cast once, straight from what was trained to what is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.engine.optimizer import full_shape
from rlhf_ray.models.disk_names import disk_names
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.quantization import dequantized, dequantized_like

Group = list[tuple[str, Tensor]]


def layer_of(name: str) -> str:
    """The part of a live name that says its layer: up to the first number; a parameter outside of layers is its own."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return name


def layers(module: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters of ``module`` by live name, neighbours of one layer together."""
    named = list(module.named_parameters())
    return [list(group) for _, group in groupby(named, key=lambda item: layer_of(item[0]))]


def gathered_groups(module: nn.Module, *, receive: bool) -> Iterator[Group]:
    """Walk the layers of ``module``; with ``receive`` each comes as whole tensors on the CPU, else as an empty group."""
    for layer in layers(module):
        with _whole([parameter for _, parameter in layer]):
            group = [(name, _copy(parameter)) for name, parameter in layer] if receive else []
        yield group


class DiskWeights:
    """The weights of a model by their names on disk, in the shape of vLLM's ``WeightSource``: iterate as often as needed.

    Collective under ZeRO-3: every rank iterates to the end. Where ``receive`` is false the groups are empty. Weights are
    cast to ``dtype``; none leaves them as they are trained.
    """

    def __init__(
        self, model: PreTrainedModel | SequenceRegression, dtype: torch.dtype | None = None, *, receive: bool
    ) -> None:
        self._model, self._dtype, self._receive = model, dtype, receive

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of all that iteration yields, in its order, without moving a weight."""
        described = []
        for layer in layers(self._model):
            empty = [(name, _described(parameter)) for name, parameter in layer]
            for name, tensor in self._converted(empty):
                described.append((name, tensor.dtype, tuple(tensor.shape)))
        return described

    def iter_groups(self) -> Iterator[Group]:
        """The weights, a layer at a time."""
        for group in gathered_groups(self._model, receive=self._receive):
            yield self._converted(group) if group else []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The weights one by one."""
        for group in self.iter_groups():
            yield from group

    def _converted(self, group: Group) -> Group:
        return [(name, self._cast(tensor).contiguous()) for name, tensor in disk_names(self._model, group)]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor


def _whole(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[object]:
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed  # sharded parameters are DeepSpeed's, which is loaded then

    context: contextlib.AbstractContextManager[object] = deepspeed.zero.GatheredParameters(sharded)
    return context


def _described(parameter: nn.Parameter) -> Tensor:
    """An empty tensor like the whole weight."""
    four_bit = dequantized_like(parameter)
    return torch.empty(full_shape(parameter), dtype=parameter.dtype, device="meta") if four_bit is None else four_bit


def _copy(parameter: nn.Parameter) -> Tensor:
    return dequantized(parameter).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
