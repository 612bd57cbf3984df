"""Models with the shapes of published ones and random weights, made where they are used: nothing is downloaded.

Always true: a shape is the config of the published model, apart from its number of layers where fewer are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config

from rlhf_ray.environment import Device
from rlhf_ray.planning.flops import ComputeShape, training_flops

QWEN3 = {
    "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip
SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_of(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The config of a shape."""
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    return Qwen3Config(**SHAPES[name] | fewer)


def make(name: str, device: Device | Literal["meta"], layers: int | None = None) -> PreTrainedModel:
    """A causal language model in bf16 with random weights, which are drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(name, layers), dtype=torch.bfloat16)
    return model


def compute_shape(model: PreTrainedModel) -> ComputeShape:
    """What a token of a model costs: the matrices that multiply, those of its adapters and its output layer included."""
    config, embedding = model.config, model.get_input_embeddings().weight
    multiplies = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
    output = model.get_output_embeddings()
    if output is not None and output.weight is embedding:
        multiplies.append(embedding)
    return ComputeShape(
        parameters=sum(p.numel() for p in multiplies),
        trained=sum(p.numel() for p in multiplies if p.requires_grad),
        layers=config.num_hidden_layers,
        width=config.num_attention_heads * config.head_dim,
    )


def scoring_flops(shape: ComputeShape, lengths: Iterable[int]) -> float:
    """Operations of a forward pass: a third of training in which every weight is trained."""
    return training_flops(replace(shape, trained=shape.parameters), lengths) / 3
