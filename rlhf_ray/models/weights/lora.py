"""LoRA: small trainable matrices on the layers of a frozen model (Hu et al. 2021, arXiv:2106.09685).

Invariants: the model keeps its structure; adapters are put into its layers. A layer is known by its name in the whole model, as
PEFT knows it, whether or not the model in memory has an output layer. Only adapters and heads are trainable, and only layers
that text passes through are adapted. What is exported is the merged weight ``W + scaling * B A``, so no reader needs to know
about adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.experts import expert_parameters, text_part
from rlhf_ray.models.weights.quantization import bitsandbytes

ADAPTER = "default"
"""The name under which PEFT keeps an adapter in memory."""
ADAPTED_PARTS = frozenset({"base_layer", "lora_A", "lora_B"})
"""What PEFT calls the parts of a layer that has an adapter."""
MERGED_AT_ONCE = 2**17
"""Numbers of a weight that are merged at a time on the CPU: in fp32 they fit into a core's cache."""
EVERY_LINEAR = "all-linear"
"""The target that stands for every linear layer."""
LINEAR = (nn.Linear, Conv1D)
"""Layers that can be adapted; a Conv1D, as in GPT-2, is a linear layer with its weight transposed."""


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = None,
) -> None:
    """Put an adapter on the target layers and freeze all other parameters.

    ``targets`` are last parts of names, or a regular expression for whole names. By default they are all linear layers, or in
    a mixture of experts those of attention. Layers of a vision tower and the output layer are never among them.
    """
    wanted = EVERY_LINEAR if targets is None else targets if isinstance(targets, str) else list(targets)
    names = _target_names(model, wanted)
    config = peft().LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")
    inject(model, config)


def peft() -> ModuleType:
    """Import PEFT, which is slow and which only models with adapters need."""
    bitsandbytes()  # import it first in our own way: PEFT would import it so that it looks for kernels on a hub
    import peft

    return peft


def whole_names(model: PreTrainedModel, head: nn.Module | None = None) -> nn.Module:
    """Return a container in which each module of ``model`` has the name that it has in the whole model.

    A backbone lies there under its prefix, and ``head`` beside it. The modules are the same objects, so that what is put in the
    place of a layer within the container is put into the model, but for the children of the container itself.
    """
    backbone = {model.base_model_prefix: model, HEAD_NAME: head}
    view = nn.Module()
    for name, child in (backbone if model.base_model is model else dict(model.named_children())).items():
        view.add_module(name, child)
    return view


def inject(
    model: PreTrainedModel, config: Any, *, head: nn.Module | None = None, tensors: Collection[str] | None = None
) -> nn.Module:
    """Put the adapter that the ``LoraConfig`` describes on the model and ``head``; return the container of both.

    ``tensors`` names the adapter's tensors, which then say which layers get one; by default the config does. All parameters
    but those of the adapter are frozen.
    """
    view = whole_names(model, head)
    state = None if tensors is None else {name: torch.empty(0) for name in tensors}
    config.base_model_name_or_path = model.name_or_path
    with warnings.catch_warnings():  # of tied layers and transposed weights, which are read right or refused here
        warnings.simplefilter("ignore")
        peft().inject_adapter_in_model(config, view, ADAPTER, state_dict=state)
    model.peft_config = {ADAPTER: config}
    return view


def _target_names(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Return the names of the layers that ``targets`` means, or refuse a target that fits none."""
    linear = linear_names(model)
    if targets == EVERY_LINEAR:
        mixture = bool(expert_parameters(model))
        return [name for name in linear if not mixture or "attn" in name or "attention" in name]
    if isinstance(targets, str):
        matched = [name for name, _ in whole_names(model).named_modules() if re.fullmatch(targets, name)]
        inside = [name for name in matched if _is_text(model, name)]
        if not inside or set(inside) - set(linear):
            raise _unfit(model, targets, "do")
        return inside
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise _unfit(model, target, "does")
    return [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]


def _unfit(model: PreTrainedModel, targets: object, do: str) -> ModelLoadError:
    last = {name.rpartition(".")[2] for name in linear_names(model)}
    experts = (
        " (the experts of a mixture are 3-D parameters, which no adapter reaches)" if expert_parameters(model) else ""
    )
    return ModelLoadError(
        f"LoRA targets {targets!r} {do} not fit {type(model).__name__}: choose all-linear or some of "
        f"{', '.join(sorted(last))}{experts}"
    )


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the whole names of the linear layers that text passes through, without the output layer."""
    output = model.get_output_embeddings()
    return [
        name
        for name, layer in whole_names(model).named_modules()
        if isinstance(layer, LINEAR) and layer is not output and _is_text(model, name)
    ]


def _is_text(model: PreTrainedModel, name: str) -> bool:
    """Whether a module lies in the part of the model that reads text, and not in a vision tower."""
    part = text_part(model)
    path = next((path for path, module in whole_names(model).named_modules() if module is part), "")
    return not path or name.startswith(f"{path}.")


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the three tensors of each adapted layer (base, A and B) by the merged weight, under the name of the layer."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_adapter_part(name):
            continue
        layer, base, parameter = name.rpartition(".base_layer.")
        if not base:
            whole[name] = tensor
        elif parameter == "weight":
            whole[f"{layer}.weight"] = _merge(model.get_submodule(layer), layer, tensors)
        else:
            whole[f"{layer}.{parameter}"] = tensor
    return whole


def without_adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the tensors of each adapted layer by those of its base, under the name of the layer."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if not is_adapter_part(name)}


def is_adapter_part(name: str) -> bool:
    """Whether the tensor of this name in memory is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that hold an adapter, by name; each has dicts ``r`` and ``scaling`` by the name of the adapter."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


@torch.no_grad()
def _merge(layer: Any, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + scaling * B A`` in fp32, on the device of ``W``.

    On the CPU it is done some rows at a time, which stay in the cache: whole matrices in fp32 would be fresh memory each, which
    takes most of the time.
    """
    weight = tensors[f"{name}.base_layer.weight"]
    down, up = (tensors[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
    left, right = (down.T, up.T) if layer.fan_in_fan_out else (up, down)
    rows = max(1, MERGED_AT_ONCE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    whole = torch.empty_like(weight)
    for part, old, factor in zip(whole.split(rows), weight.split(rows), left.split(rows), strict=True):
        part.copy_(torch.addmm(old.float(), factor, right, alpha=layer.scaling[ADAPTER]))
    return whole
