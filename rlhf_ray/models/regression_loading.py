"""Load a reward model or critic: a backbone, and a head that is loaded with it or made fresh.

Invariants: a checkpoint without a head is refused unless the caller asks for a fresh one. The same seed gives the same fresh
head. The name and the parameters of the loader are those of OpenRLHF.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, PreTrainedModel

from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.description import describe
from rlhf_ray.models.dtypes import torch_dtype
from rlhf_ray.models.heads import (
    HeadInit,
    ScoreHead,
    adapter_head_name,
    find_head,
    fresh_head,
    head_tensors,
    read_adapter_head,
    read_head,
)
from rlhf_ray.models.regression import CriticModel, RewardModel, SequenceRegression
from rlhf_ray.models.weights.adapters import load_adapter, refuse_second_adapter
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.embeddings import input_embedding
from rlhf_ray.models.weights.load import check_packing, load_weights, prepare_for_packs
from rlhf_ray.models.weights.lora import add_lora

OUTPUT_LAYERS = {f"{layer}.{part}" for layer in ("lm_head", "embed_out", "output") for part in ("weight", "bias")}
"""Tensors of a causal language model that a reward model or critic does not need."""


def get_llm_for_sequence_regression(
    model_name_or_path: str,
    model_type: str,
    *,
    param_dtype: str = "bf16",
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: float = 16,
    target_modules: str | list[str] | None = None,
    lora_dropout: float = 0,
    normalize_reward: bool = False,
    attn_implementation: str = "flash_attention_2",
    ds_config: dict[str, Any] | None = None,
    init_value_head: bool = False,
    value_head_prefix: str = "score",
    device_map: Any = None,
    packing_samples: bool = False,
    head_init: HeadInit = "inv_sqrt",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    strict_attention: bool = False,
) -> SequenceRegression:
    """Load a reward model (``model_type="reward"``) or a critic (``"critic"``).

    ``model_name_or_path`` is a directory or hub id: a ``*ForSequenceClassification`` model of transformers, a model of
    OpenRLHF, or a value-head model of TRL. With ``init_value_head`` it may be any causal language model, which gets a fresh
    head of kind ``head_init``, drawn from ``seed``. If ``ds_config`` asks for ZeRO-3, the backbone is built in shards, on all
    ranks together.
    """
    _class_for(model_type)
    checkpoint = Checkpoint.open(model_name_or_path, revision, trust_remote_code=trust_remote_code)
    refuse_second_adapter(model_name_or_path, checkpoint.adapter, lora_rank)
    raw = checkpoint.raw_config()
    prefix = raw.get("value_head_prefix", value_head_prefix)
    normalization = _read_normalization(raw, checkpoint, normalize_reward)
    _require_head(checkpoint, prefix, init_value_head)
    backbone = load_weights(
        AutoModel,
        checkpoint,
        torch_dtype(param_dtype),
        heads=OUTPUT_LAYERS | head_tensors(checkpoint) | {f"{prefix}.weight", f"{prefix}.bias"},
        ds_config=ds_config,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        load_in_4bit=load_in_4bit,
    )
    head, bias, origin = (
        _load_head(checkpoint, prefix, backbone)
        if not init_value_head
        else _make_fresh_head(checkpoint, prefix, backbone, head_init, seed)
    )
    model = wrap_backbone(
        backbone,
        head,
        model_type,
        value_head_prefix=prefix,
        head_origin=origin,
        packing_samples=packing_samples,
        score_bias=bias,
        normalization=normalization,
        attention=attn_implementation,
        strict_attention=strict_attention,
    )
    if checkpoint.adapter is not None:
        load_adapter(model.backbone, checkpoint.adapter, inside=f"{model.backbone_name}.")
    elif lora_rank:
        add_lora(model.backbone, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=target_modules)
    get_logger(__name__).info("%s: %s", model_name_or_path, describe(model))
    return model


def wrap_backbone(
    backbone: PreTrainedModel,
    head: ScoreHead,
    model_type: str,
    *,
    attention: str,
    strict_attention: bool,
    head_origin: str,
    value_head_prefix: str = "score",
    score_bias: float = 0.0,
    normalization: tuple[float, float] | None = None,
    packing_samples: bool = False,
) -> SequenceRegression:
    """Put a head on a backbone and make both ready to run packed.

    ``head_origin`` says where the head came from, for the line on loading.
    """
    backend, note = prepare_for_packs(backbone, attention, strict=strict_attention)
    check_packing(backbone, backbone)
    model = _class_for(model_type)(
        backbone,
        head.to(input_embedding(backbone).weight.device),
        value_head_prefix=value_head_prefix,
        score_bias=score_bias,
        normalization=normalization,
        packing_samples=packing_samples,
    )
    model.attention, model.attention_note, model.head_origin = backend, note, head_origin
    return model


def make_head(backbone: PreTrainedModel, init: HeadInit, seed: int) -> ScoreHead:
    """Make a fresh head for a backbone."""
    config = backbone.config.get_text_config()
    return fresh_head(config.hidden_size, init, initializer_range=config.initializer_range, seed=seed)


def _require_head(checkpoint: Checkpoint, prefix: str, init_value_head: bool) -> None:
    """Refuse a checkpoint without a head, before anything is loaded, unless a fresh head is asked for."""
    beside = checkpoint.adapter is not None and adapter_head_name(checkpoint.adapter) is not None
    if init_value_head or beside or find_head(checkpoint, prefix) is not None:
        return
    raise ModelLoadError(
        f"{checkpoint.adapter or checkpoint.directory} has no score head ({prefix}.weight), so it is not a reward model "
        "or critic. Ask for a fresh head (init_value_head=True; in a config, head_init) or choose another checkpoint"
    )


def _load_head(checkpoint: Checkpoint, prefix: str, backbone: PreTrainedModel) -> tuple[ScoreHead, float, str]:
    """Load the head and its bias, and say where it was. A head beside an adapter comes first: both were trained together."""
    hidden = backbone.config.get_text_config().hidden_size
    if checkpoint.adapter is not None and adapter_head_name(checkpoint.adapter) is not None:
        return read_adapter_head(checkpoint.adapter, hidden), 0.0, "loaded with the adapter"
    name = find_head(checkpoint, prefix)
    assert name is not None  # _require_head has made sure of it
    head, bias = read_head(checkpoint, name, hidden)
    return head, float(checkpoint.raw_config().get("score_bias", bias)), f"loaded from {name}"


def _make_fresh_head(
    checkpoint: Checkpoint, prefix: str, backbone: PreTrainedModel, init: HeadInit, seed: int
) -> tuple[ScoreHead, float, str]:
    replaced = find_head(checkpoint, prefix)
    origin = f"fresh, {init}, seed {seed}" + (f", in place of {replaced}" if replaced else "")
    return make_head(backbone, init, seed), 0.0, origin


def _class_for(model_type: str) -> type[SequenceRegression]:
    classes: dict[str, type[SequenceRegression]] = {"reward": RewardModel, "critic": CriticModel}
    if model_type not in classes:
        raise ModelLoadError(f"unknown model_type {model_type!r}: choose reward or critic")
    return classes[model_type]


def _read_normalization(
    raw: dict[str, Any], checkpoint: Checkpoint, normalize_reward: bool
) -> tuple[float, float] | None:
    if not normalize_reward:
        return None
    if "mean" not in raw or "std" not in raw:
        raise ModelLoadError(
            f"normalize_reward is set, but {checkpoint.directory / 'config.json'} has no mean and "
            "std: train the reward model with this project, write them there, or leave it off"
        )
    if not raw["std"] > 0:
        raise ModelLoadError(f"std in {checkpoint.directory / 'config.json'} is {raw['std']}, but must be above 0")
    return float(raw["mean"]), float(raw["std"])
