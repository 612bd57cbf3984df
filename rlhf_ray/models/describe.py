"""What a loaded model is, in one line.

Always true: the line names everything that decides a model's numbers: architecture, parameters, dtype, attention
backend, head, special tokens, quantisation, adapters, normalisation.
"""

from __future__ import annotations

from torch import nn

from rlhf_ray.models.actor import Actor
from rlhf_ray.models.regression import RewardModel, SequenceRegression
from rlhf_ray.models.weights.experts import expert_parameters
from rlhf_ray.models.weights.load import DTYPES
from rlhf_ray.models.weights.lora import ADAPTER, adapted_layers
from rlhf_ray.models.weights.quantization import dequantized_like, four_bit_layers


def describe(model: Actor | SequenceRegression) -> str:
    """Describe a policy, reward model or critic."""
    inner = model.model if isinstance(model, Actor) else model.backbone
    parts = [
        f"{_role(model)} {type(inner).__name__}",
        _parameters(model),
        next(name for name, dtype in DTYPES.items() if dtype == inner.dtype),
        f"attention {model.attention}" + (f" ({model.attention_note})" if model.attention_note else ""),
        _head(model),
        _tokens(model),
        _quantization(inner),
        _lora(inner),
    ]
    if isinstance(model, SequenceRegression):
        parts.append(_normalization(model))
    return ", ".join(parts)


def _role(model: Actor | SequenceRegression) -> str:
    if isinstance(model, Actor):
        return "policy"
    return "reward" if isinstance(model, RewardModel) else "critic"


def _parameters(model: nn.Module) -> str:
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)
    return f"{_count(total)} parameters" + ("" if trained == total else f" ({_count(trained)} trainable)")


def _size(parameter: nn.Parameter) -> int:
    """Numbers in the whole parameter, also where it lies in shards or two of them share a byte."""
    four_bit = dequantized_like(parameter)
    if four_bit is not None:
        return four_bit.numel()
    size: int = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return size


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _head(model: Actor | SequenceRegression) -> str:
    if isinstance(model, Actor):
        tied = model.model.get_input_embeddings().weight is model.log_prob_head.weight
        return "log-probs fp32 in chunks" + (", embeddings tied" if tied else "")
    bias = f", bias {model.score_bias:.4g}" if model.score_bias else ""
    return f"head {model.value_head_prefix} fp32 ({model.head_origin}{bias})"


def _tokens(model: Actor | SequenceRegression) -> str:
    config = model.config.get_text_config()
    return f"pad {config.pad_token_id}, eos {config.eos_token_id}"


def _quantization(model: nn.Module) -> str:
    layers = four_bit_layers(model)
    return f"NF4 on {len(layers)} layers{_not_experts(model)}" if layers else "no quantisation"


def _lora(model: nn.Module) -> str:
    layers = list(adapted_layers(model).values())
    if not layers:
        return "no LoRA"
    return f"LoRA rank {layers[0].r[ADAPTER]} on {len(layers)} layers{_not_experts(model)}"


def _not_experts(model: nn.Module) -> str:
    return " (not on the experts, which are 3-D parameters)" if expert_parameters(model) else ""


def _normalization(model: SequenceRegression) -> str:
    if model.normalization is None:
        return "not normalised"
    return "normalised by mean {:.4g}, std {:.4g}".format(*model.normalization)
