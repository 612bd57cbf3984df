"""What a model is: a loaded one in a line, and the shapes of one of which only the config is here.

Invariants: the line names everything that decides a model's numbers: architecture, parameters, dtype, attention backend,
head, special tokens, quantisation, adapters and normalisation. Shapes are found without reading a weight or asking a hub.

Policies, reward models and critics state in :class:`ModelFacts` what only they know; the rest is read from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.config.files.score_heads import Shape
from rlhf_ray.models.dtypes import dtype_name
from rlhf_ray.models.weights.experts import expert_parameters
from rlhf_ray.models.weights.lora import ADAPTER, adapted_layers
from rlhf_ray.models.weights.quantization import dequantized_like, four_bit_layers


@dataclass(frozen=True)
class ModelFacts:
    """What a policy, reward model or critic knows about itself."""

    role: str
    """``policy``, ``reward`` or ``critic``."""
    inner: PreTrainedModel
    """The transformers model inside."""
    head: str
    """What is computed from hidden states, and where the weights of that came from."""
    attention: str
    """The attention backend in use."""
    attention_note: str | None
    """Why it is not the backend that was asked for; None if it is."""
    normalization: str | None = None
    """How scores are normalised; None for a model without scores."""


class Describable(Protocol):
    """A model that states its facts."""

    def facts(self) -> ModelFacts:
        """Return what the model knows about itself."""
        ...


def describe(model: Describable) -> str:
    """Describe a policy, reward model or critic in one line."""
    facts = model.facts()
    parts = [
        f"{facts.role} {type(facts.inner).__name__}",
        _parameters(model),
        dtype_name(facts.inner.dtype),
        f"attention {facts.attention}" + (f" ({facts.attention_note})" if facts.attention_note else ""),
        facts.head,
        _tokens(facts.inner),
        _quantization(facts.inner),
        _lora(facts.inner),
    ]
    return ", ".join(parts if facts.normalization is None else [*parts, facts.normalization])


def _parameters(model: Describable) -> str:
    assert isinstance(model, nn.Module)
    sizes = [(_whole_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, requires_grad in sizes if requires_grad)
    return f"{_short(total)} parameters" + ("" if trainable == total else f" ({_short(trainable)} trainable)")


def _whole_size(parameter: nn.Parameter) -> int:
    """Count the numbers in the whole parameter, even if this rank holds a shard or two 4-bit numbers share a byte."""
    four_bit = dequantized_like(parameter)
    if four_bit is not None:
        return four_bit.numel()
    size: int = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return size


def _short(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _tokens(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    pad, eos = (getattr(config, name, getattr(model.config, name, None)) for name in ("pad_token_id", "eos_token_id"))
    return f"pad {pad}, eos {eos}"


def _quantization(model: nn.Module) -> str:
    layers = four_bit_layers(model)
    return f"NF4 on {len(layers)} layers{_without_experts(model)}" if layers else "no quantisation"


def _lora(model: nn.Module) -> str:
    layers = list(adapted_layers(model).values())
    if not layers:
        return "no LoRA"
    return f"LoRA rank {layers[0].r[ADAPTER]} on {len(layers)} layers{_without_experts(model)}"


def _without_experts(model: nn.Module) -> str:
    return " (not on the experts, which are 3-D parameters)" if expert_parameters(model) else ""


@cache
def shapes_on_meta(directory: str, trust_remote_code: bool = False) -> Mapping[str, Shape]:
    """Names and shapes of the parameters of a language model that only a ``config.json`` describes, made on the meta device.

    Empty where transformers does not know the architecture.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError):
        return {}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
