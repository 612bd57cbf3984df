"""Load a reward model or critic: a backbone, and a head that is loaded with it or made fresh.

Invariants: a checkpoint without a head is refused unless the caller asks for a fresh one. The same seed gives the same fresh
head. The name and the parameters of the loader are those of OpenRLHF.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from rlhf_ray.config.files.score_heads import OUTPUT_LAYERS, FoundHead
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.description import describe
from rlhf_ray.models.dtypes import torch_dtype
from rlhf_ray.models.head_layouts import (
    find_adapter_head,
    find_head,
    head_tensors,
    holds_scoring_model,
    outside_backbone,
    read_head,
    require_head,
)
from rlhf_ray.models.heads import Head, HeadInit, ScoreHead, fresh_head
from rlhf_ray.models.regression import CriticModel, RewardModel, SequenceRegression
from rlhf_ray.models.weights.adapters import load_adapter, refuse_second_adapter
from rlhf_ray.models.weights.checkpoint import HEAD_NAME, Checkpoint
from rlhf_ray.models.weights.encoder_config import refuse_encoder
from rlhf_ray.models.weights.load import (
    check_packing,
    device_of,
    load_weights,
    prepare_for_packs,
    refuse_what_does_not_run,
)
from rlhf_ray.models.weights.lora import add_lora

DEFAULT_DEVIATION = 0.02
"""Standard deviation of fresh weights where a config names none, as in transformers."""


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
    replace_value_head: bool = True,
    value_head_prefix: str = "score",
    device_map: Any = None,
    packing_samples: bool = False,
    head_init: HeadInit = "inv_sqrt",
    seed: int = 0,
    device: torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    strict_attention: bool = False,
) -> SequenceRegression:
    """Load a reward model (``model_type="reward"``) or a critic (``"critic"``).

    ``model_name_or_path`` is a directory or hub id: a ``*ForSequenceClassification`` model of transformers, a model of
    OpenRLHF, a value-head model of TRL, or any other whose head :mod:`rlhf_ray.models.head_layouts` reads. With
    ``init_value_head`` it may be any causal language model, which gets a fresh head of kind ``head_init``, drawn from
    ``seed``; without ``replace_value_head`` a head that it has already is kept. ``device`` is where the model computes; without
    one it lies where ``device_map`` puts it, by default on the CPU. If ``ds_config`` asks for ZeRO-3, the backbone is built in
    shards, on all ranks together.
    """
    _class_for(model_type)
    checkpoint = _open_decoder(model_name_or_path, revision, model_type, trust_remote_code)
    refuse_second_adapter(model_name_or_path, checkpoint.adapter, lora_rank)
    raw = checkpoint.raw_config()
    prefix = _head_name(raw, value_head_prefix)
    normalization = _read_normalization(raw, checkpoint, normalize_reward)
    beside = None if checkpoint.adapter is None else find_adapter_head(checkpoint.adapter)
    fresh = init_value_head and (replace_value_head or not holds_scoring_model(checkpoint, prefix))
    if not fresh and beside is None:
        require_head(checkpoint, prefix, trust_remote_code=trust_remote_code)
    backbone = load_weights(
        AutoModel,
        checkpoint,
        torch_dtype(param_dtype),
        heads=head_tensors(checkpoint, prefix),
        ds_config=ds_config,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        load_in_4bit=load_in_4bit,
    )
    place, found = beside or (checkpoint, find_head(checkpoint, prefix))
    if fresh:
        head, bias, origin = _make_fresh_head(checkpoint, found, backbone, head_init, seed, trust_remote_code)
    else:
        head, bias, origin = _load_head(place, found, checkpoint, backbone)
        origin += "; head_init is for a model without a head, and is not used" if init_value_head else ""
    model = wrap_backbone(
        backbone,
        head,
        model_type,
        value_head_prefix=HEAD_NAME if prefix in OUTPUT_LAYERS else prefix,
        head_origin=origin,
        packing_samples=packing_samples,
        score_bias=bias,
        normalization=normalization,
        attention=attn_implementation,
        strict_attention=strict_attention,
        device=device,
    )
    if checkpoint.adapter is not None:
        load_adapter(model.backbone, checkpoint.adapter, head=None if init_value_head else model.head)
    elif lora_rank:
        add_lora(model.backbone, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=target_modules)
    get_logger(__name__).info("%s: %s", model_name_or_path, describe(model))
    return model


def _open_decoder(path: str, revision: str | None, model_type: str, trust_remote_code: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(path, revision, trust_remote_code=trust_remote_code)
    refuse_encoder(checkpoint)
    refuse_what_does_not_run(checkpoint, scores=model_type == "reward")
    return checkpoint


def wrap_backbone(
    backbone: PreTrainedModel,
    head: Head,
    model_type: str,
    *,
    attention: str,
    strict_attention: bool,
    head_origin: str,
    value_head_prefix: str = "score",
    score_bias: float = 0.0,
    normalization: tuple[float, float] | None = None,
    packing_samples: bool = False,
    device: torch.device | None = None,
) -> SequenceRegression:
    """Put a head on a backbone, where the backbone lies, and make both ready to run packed.

    ``head_origin`` says where the head came from, for the line on loading. ``device`` is where a backbone in shards computes;
    any other computes where it lies.
    """
    backend, note = prepare_for_packs(backbone, attention, strict=strict_attention, device=device)
    check_packing(backbone, backbone)
    model = _class_for(model_type)(
        backbone,
        head.to(device_of(backbone)),
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
    named = [getattr(config, name, None) for name in ("initializer_range", "init_std")]
    deviation = next((number for number in named if number is not None), DEFAULT_DEVIATION)
    return fresh_head(config.hidden_size, init, initializer_range=deviation, seed=seed)


def _head_name(raw: dict[str, Any], asked: str) -> str:
    """What the head is called: what the caller says, unless that is the default, or else what config.json says."""
    return asked if asked != HEAD_NAME else str(raw.get("value_head_prefix") or asked)


def _load_head(
    place: Checkpoint, found: FoundHead | None, checkpoint: Checkpoint, backbone: PreTrainedModel
) -> tuple[Head, float, str]:
    """Load the head and its bias from ``place``, the checkpoint or the adapter on it, and say where it was."""
    assert found is not None  # require_head has made sure of it
    head, bias = read_head(place, found, backbone.config.get_text_config().hidden_size)
    if place is not checkpoint:
        return head, bias, "loaded with the adapter"
    raw = checkpoint.raw_config()
    written = raw.get("score_bias")
    if isinstance(written, (int, float)) and not isinstance(written, bool):  # safe-rlhf: whether the head has one
        bias = float(written)
    if "reward_token_id" in raw:
        get_logger(__name__).warning(
            "%s names reward_token_id %s: its authors end every item with that token and read the score there. Here the score "
            "is read at the last token: end the items with it",
            checkpoint.directory / "config.json",
            raw["reward_token_id"],
        )
    return head, bias, f"loaded from {found.kind}"


def _make_fresh_head(
    checkpoint: Checkpoint,
    found: FoundHead | None,
    backbone: PreTrainedModel,
    init: HeadInit,
    seed: int,
    trust_remote_code: bool,
) -> tuple[Head, float, str]:
    others = outside_backbone(checkpoint, trust_remote_code=trust_remote_code)
    trained = found.kind if found else ", ".join(others[:4])
    if trained:
        get_logger(__name__).warning(
            "%s holds a trained head (%s), which a fresh one replaces, because replace_head or init_value_head asks for it, or "
            "it has no known name: leave them out, or name it in value_head_prefix, to go on with the trained one",
            checkpoint.adapter or checkpoint.directory,
            trained,
        )
    origin = f"fresh, {init}, seed {seed}" + (f", in place of {trained}" if trained else "")
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
