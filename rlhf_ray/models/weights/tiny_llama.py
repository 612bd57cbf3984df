"""Make small Llama models with random weights, for demos, tests and machines that cannot download a model.

Invariants: the same shape, vocabulary and seed give the same weights bit for bit, whatever the state of the global random
generator, which is left as it was. Every shape uses a head size that vLLM's CPU backend supports.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.sections.models import MADE_SHAPES
from rlhf_ray.errors import ModelLoadError

MAX_POSITIONS = 4096


def make_config(
    shape: str,
    vocabulary: int,
    *,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> LlamaConfig:
    """Make the config of a model of this shape with ``vocabulary`` tokens."""
    if shape not in MADE_SHAPES:
        raise ModelLoadError(f"unknown model shape {shape!r}: choose one of {', '.join(MADE_SHAPES)}")
    sizes = MADE_SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def make_model(
    shape: str,
    vocabulary: int,
    *,
    seed: int = 0,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> LlamaForCausalLM:
    """Make a causal language model in fp32 with random weights drawn from ``seed``."""
    config = make_config(
        shape, vocabulary, pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
