"""Low-rank adapters on a transformers model, and the weights that they amount to.

Always true: the model keeps its structure (adapters are put into its layers), only adapters and heads are trainable,
and what is exported is the merged weight ``W + scaling * B A``, so that no reader needs to know about adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.errors import ModelLoadError

ADAPTER = "default"


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = None,
) -> None:
    """Put an adapter on the target layers (default: every linear layer) and freeze the rest."""
    from peft import LoraConfig  # slow to import, and only models with adapters need it

    wanted = "all-linear" if targets is None else targets if isinstance(targets, str) else list(targets)
    adapter = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted, bias="none")
    try:
        model.add_adapter(adapter, ADAPTER)
    except ValueError as error:
        linear = sorted(
            {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        )
        raise ModelLoadError(
            f"LoRA targets {wanted!r} do not fit {type(model).__name__}: choose all-linear or some of "
            f"{', '.join(sorted(linear))}"
        ) from error


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the three tensors of each adapted layer by its merged weight, under the layer's own name."""
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
    """Return the layers that hold an adapter, by name (with ``r`` and ``scaling`` by adapter)."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def _merge(layer: Any, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    weight = tensors[f"{name}.base_layer.weight"]
    down, up = tensors[f"{name}.lora_A.{ADAPTER}.weight"], tensors[f"{name}.lora_B.{ADAPTER}.weight"]
    change = layer.scaling[ADAPTER] * (up.float() @ down.float())
    return torch.add(weight.float(), change).to(weight.dtype)
