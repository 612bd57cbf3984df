"""Load or make the policy, reward model or critic that a config describes.

Invariants: the result is what the config asks for, or an error says what prevents it. The same config and seed give the same
weights on every rank and in every process, and leave the global random generator as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.devices import CPU, seeded
from rlhf_ray.models.dtypes import torch_dtype
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression, make_head, wrap_backbone
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.models.weights.embeddings import check_vocabulary
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.models.weights.tiny_llama import make_model
from rlhf_ray.models.weights.tokenizer import load_tokenizer, prepare_padding


def load_policy(
    config: ModelConfig, *, device: torch.device = CPU, ds_config: dict[str, Any] | None = None, seed: int = 0
) -> Actor:
    """Load or make a policy or reference on ``device``. Its vocabulary is never resized, since packs need no pad token.

    ``seed`` draws the adapters of LoRA; a model that is made has a seed of its own in the config.
    """
    tokenizer = load_tokenizer(config)
    with _source(config, tokenizer) as source, seeded(seed, device):
        actor = Actor(
            source,
            device=device,
            attn_implementation=config.attention,
            strict_attention=config.attention != "auto",
            param_dtype=config.dtype,
            head_dtype=config.head_dtype,
            load_in_4bit=config.quantization is not None,
            ds_config=ds_config,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **_lora(config),
        )
    check_vocabulary(actor.model, tokenizer)
    if config.gradient_checkpointing:
        actor.gradient_checkpointing_enable()
    return actor


def load_regression(
    config: ModelConfig,
    model_type: str,
    *,
    device: torch.device = CPU,
    ds_config: dict[str, Any] | None = None,
    seed: int = 0,
    normalize_reward: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SequenceRegression:
    """Load or make a reward model or critic on ``device``, with a pad token: that of ``tokenizer``, by default the model's own.

    Whatever is not loaded (head, adapters, new rows of the embedding) is drawn from ``seed``.
    """
    tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
    if config.path is None and normalize_reward:
        raise ModelLoadError(
            "a model made from a shape has no mean and std to normalise rewards with: leave normalize off"
        )
    with _source(config, tokenizer) as source, seeded(seed, device):
        if isinstance(source, PreTrainedModel):
            model = _wrap_made(nn.Module.to(source, device), config, model_type, seed)
        else:
            model = get_llm_for_sequence_regression(
                source,
                model_type,
                attn_implementation=config.attention,
                strict_attention=config.attention != "auto",
                param_dtype=config.dtype,
                load_in_4bit=config.quantization is not None,
                ds_config=ds_config,
                init_value_head=config.path is None or config.head_init is not None,
                replace_value_head=config.replace_head,
                head_init=config.head_init or "inv_sqrt",
                value_head_prefix=config.value_head_prefix,
                normalize_reward=normalize_reward,
                seed=seed,
                device=device,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                **_lora(config),
            )
    prepare_padding(model.backbone, tokenizer, seed=seed, ds_config=ds_config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


@contextmanager
def _source(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | PreTrainedModel]:
    """Yield what to load from: a path, or a model that is made here.

    To be read into 4 bits, a made model is first written to a temporary directory.
    """
    if config.path is not None:
        yield config.path
    elif config.quantization is None:
        yield _make(config, tokenizer)
    else:
        with TemporaryDirectory() as directory:
            save_pretrained(_make(config, tokenizer), None, directory)
            yield directory


def _make(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    assert config.make is not None
    model = make_model(
        config.make.shape,
        len(tokenizer),
        seed=config.make.seed,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return nn.Module.to(model, torch_dtype(config.dtype))


def _wrap_made(causal_model: PreTrainedModel, config: ModelConfig, model_type: str, seed: int) -> SequenceRegression:
    backbone, init = cast(PreTrainedModel, causal_model.base_model), config.head_init or "inv_sqrt"
    model = wrap_backbone(
        backbone,
        make_head(backbone, init, seed),
        model_type,
        attention=config.attention,
        strict_attention=config.attention != "auto",
        head_origin=f"fresh, {init}, seed {seed}",
        value_head_prefix=config.value_head_prefix,
    )
    if config.lora is not None:
        add_lora(
            backbone,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=config.lora.targets,
        )
    return model


def _lora(config: ModelConfig) -> dict[str, Any]:
    if config.lora is None:
        return {}
    lora = config.lora
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": lora.targets,
    }
