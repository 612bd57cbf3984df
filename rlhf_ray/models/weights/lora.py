"""LoRA: small trainable matrices on the layers of a frozen model (Hu et al. 2021, arXiv:2106.09685).

Invariants: the model keeps its structure; adapters are put into its layers. Only adapters and heads are trainable. What is
exported is the merged weight ``W + scaling * B A``, so no reader needs to know about adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.experts import expert_parameters
from rlhf_ray.models.weights.quantization import bitsandbytes

ADAPTER = "default"
"""The name under which PEFT keeps an adapter in memory."""
ADAPTED_PARTS = frozenset({"base_layer", "lora_A", "lora_B"})
"""What PEFT calls the parts of a layer that has an adapter."""
EVERY_LINEAR = "all-linear"
"""The target that stands for every linear layer."""


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = None,
) -> None:
    """Put an adapter on the target layers and freeze all other parameters.

    The default targets are all linear layers, or in a mixture of experts those of attention.
    """
    layer_names = EVERY_LINEAR if targets is None else targets if isinstance(targets, str) else list(targets)
    if layer_names == EVERY_LINEAR and expert_parameters(model):
        layer_names = sorted(
            {name.rpartition(".")[2] for name in _linear_names(model) if "attn" in name or "attention" in name}
        )
    _check_targets(model, layer_names)
    config = peft().LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layer_names, bias="none")
    inject(model, config)


def peft() -> ModuleType:
    """Import PEFT, which is slow and which only models with adapters need."""
    bitsandbytes()  # import it first in our own way: PEFT would import it so that it looks for kernels on a hub
    import peft

    return peft


def inject(model: PreTrainedModel, config: Any) -> None:
    """Put the adapter that the ``LoraConfig`` describes on the model."""
    layer_names = config.target_modules
    try:
        model.add_adapter(config, ADAPTER)
    except ValueError as error:
        raise _unfit(model, layer_names, "do") from error
    if not all(isinstance(layer.get_base_layer(), nn.Linear) for layer in adapted_layers(model).values()):
        raise _unfit(model, layer_names, "do")  # PEFT takes some names for those of experts


def _check_targets(model: PreTrainedModel, layer_names: str | list[str]) -> None:
    """Refuse a list with a name that fits no layer: PEFT silently ignores such a name if another one fits."""
    if isinstance(layer_names, str):
        return
    names = [f".{name}" for name in _linear_names(model)]
    for target in layer_names:
        if not any(name.endswith(f".{target}") for name in names):
            raise _unfit(model, target, "does")


def _unfit(model: PreTrainedModel, targets: object, do: str) -> ModelLoadError:
    linear = {name.rpartition(".")[2] for name in _linear_names(model)}
    experts = (
        " (the experts of a mixture are 3-D parameters, which no adapter reaches)" if expert_parameters(model) else ""
    )
    return ModelLoadError(
        f"LoRA targets {targets!r} {do} not fit {type(model).__name__}: choose all-linear or some of "
        f"{', '.join(sorted(linear))}{experts}"
    )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers, without the output layer."""
    output = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not output]


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the three tensors of each adapted layer (base, A and B) by the merged weight, under the name of the layer."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, base, parameter = name.rpartition(".base_layer.")
        if not base:
            whole[name] = tensor
        elif parameter == "weight":
            whole[f"{layer}.weight"] = _merge(model.get_submodule(layer), layer, tensors)
        else:
            whole[f"{layer}.{parameter}"] = tensor
    return whole


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that hold an adapter, by name; each has dicts ``r`` and ``scaling`` by the name of the adapter."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def _merge(layer: Any, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    weight = tensors[f"{name}.base_layer.weight"]
    down, up = tensors[f"{name}.lora_A.{ADAPTER}.weight"], tensors[f"{name}.lora_B.{ADAPTER}.weight"]
    change = layer.scaling[ADAPTER] * (up.float() @ down.float())
    return torch.add(weight.float(), change).to(weight.dtype)
