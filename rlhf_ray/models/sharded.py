"""Building a model in shards for ZeRO-3, tensor by tensor from safetensors.

Always true: no rank ever holds more than one layer's module whole; every weight came from the checkpoint, which this
module checks itself; buffers (rotary frequencies) keep their precision.

transformers merges the whole state dict on every rank, and DeepSpeed's ``zero.Init`` around a constructor casts what
the constructor computes. So the structure is built empty here, and each module is filled and handed to ``zero.Init``
by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.console import progress
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.checkpoint import Checkpoint


def wants_shards(ds_config: Mapping[str, Any] | None) -> bool:
    """Whether a DeepSpeed configuration asks for ZeRO-3."""
    return ds_config is not None and ds_config.get("zero_optimization", {}).get("stage") == 3


def in_shards(model: nn.Module) -> bool:
    """Whether a model's parameters lie in shards."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def load_in_shards(
    auto: type[AutoModel] | type[AutoModelForCausalLM],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    ds_config: Mapping[str, Any],
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Do what ``load_weights`` does, on all ranks together; torch.distributed must be initialised."""
    from accelerate import init_empty_weights
    from deepspeed import zero

    config = checkpoint.config(trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    names = _names_in(checkpoint, model)
    filled: dict[int, nn.Parameter] = {}
    for path, owner in progress(list(model.named_modules()), f"building {checkpoint.directory.name} in shards"):
        for name, buffer in owner.named_buffers(recurse=False):
            if f"{path}.{name}" in names:
                buffer.copy_(checkpoint.read(names[f"{path}.{name}"]))
        fresh = False
        for name, empty in list(owner.named_parameters(recurse=False)):
            if id(empty) not in filled:
                fresh = True
                weight = _read(checkpoint, names[f"{path}.{name}"], empty)
                filled[id(empty)] = nn.Parameter(weight.to(dtype), requires_grad=empty.requires_grad)
            setattr(owner, name, filled[id(empty)])
        if fresh:
            zero.Init(module=owner, config_dict_or_path=dict(ds_config))
    return model


def _names_in(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """Find the name in the checkpoint of every parameter and persistent buffer; ties are one parameter."""
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    live = [name for name in model.state_dict() if tied.get(id(_find(model, name)), name) == name]
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in live:
        spellings = (name, prefix + name, name.removeprefix(prefix))
        found[name] = next((spelling for spelling in spellings if spelling in checkpoint.names), "")
    missing = [name for name, source in found.items() if not source]
    if missing:
        raise ModelLoadError(
            f"{checkpoint.directory} cannot be loaded in shards as {type(model).__name__}: it has no {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
            + ". It is another kind of model, or a mixture of experts, which is stored under other names and is not built "
            "in shards yet: use ZeRO stage 2 or less"
        )
    return found


def _find(model: PreTrainedModel, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _read(checkpoint: Checkpoint, name: str, empty: Tensor) -> Tensor:
    tensor = checkpoint.read(name)
    if tensor.shape != empty.shape:
        raise ModelLoadError(
            f"{name} in {checkpoint.directory} has shape {tuple(tensor.shape)}, but its config says {tuple(empty.shape)}"
        )
    return tensor
