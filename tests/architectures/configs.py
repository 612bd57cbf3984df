"""Small random models of every architecture that transformers knows, all made from one table of sizes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

VOCABULARY = 128
POSITIONS = 256
TOKENS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}

WIDTH = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "ffn_hidden_size": 96,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "num_attention_heads": 4, "num_heads": 4,
    "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "d_kv": 32, "n_embd": 128, "d_model": 128,
    "embed_dim": 128, "dim": 128, "word_embed_proj_dim": 128, "embedding_size": 128, "emb_dim": 128,
    "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "max_seq_len": POSITIONS, "n_ctx": POSITIONS,
    "sliding_window": 8, "rotary_dim": 16, "query_pre_attn_scalar": 32,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 48, "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 48, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24,
    "v_head_dim": 32,
}  # fmt: skip
STATES = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
    "state_size": 8, "use_mamba_kernels": False,
}  # fmt: skip
SIZES = WIDTH | EXPERTS | STATES | TOKENS
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1, "num_heads": 2,
    "out_hidden_size": 128, "image_size": 28, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip

SEEING = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
"""Models of images and text whose text part is scored, beside those that transformers counts as causal."""
BY_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
LATENT = {"num_key_value_heads": 4}
"""Latent attention has as many key heads as heads."""
WIDE_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
"""The only sizes of latent attention that vLLM computes on CPU."""
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "kimi_linear", "longcat_flash", "minicpm3", "mistral4",
         "youtu"),
        LATENT,
    ),
    "bamba": {"mamba_n_heads": 16, "attn_layer_indices": [1]},
    "biogpt": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": LATENT | WIDE_LATENT | {"topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": LATENT | WIDE_LATENT | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "esmc": LATENT,
    "falcon": {"ffn_hidden_size": 512, "num_kv_heads": 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0], "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": LATENT | WIDE_LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["attention", "attention"], "mamba_n_heads": 16, "mamba_d_head": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "mixtral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "phimoe": {"sliding_window": None},
    "qwen2_moe": {"sliding_window": None},
    "roberta": {"type_vocab_size": 1},
    "starcoder2": {"sliding_window": None},
    "xlm-roberta": {"type_vocab_size": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "layer_types": None},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    **{f"{name}_text": {"rope_parameters": dict(BY_AXES)} for name in SEEING},
}  # fmt: skip
"""What single architectures need besides."""


PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 48, "route_norm": True, "qk_norm": True},
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
}
"""Keys of published models of these architectures in config.json, which vLLM reads and transformers does not know."""


CORRECTIONS = ("e_score_correction_bias", "expert_bias")
"""What corrects the scores of experts, as the tensor's name ends."""


def model_types() -> list[str]:
    """Every causal architecture of transformers, and those that only classify texts."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, *SEEING})


def small_config(model_type: str) -> PreTrainedConfig:
    """The smallest usual config of an architecture; raises what transformers raises for one that it cannot make."""
    kind = CONFIG_MAPPING[model_type]
    values = _sized(kind, SIZES) | SPECIAL.get(model_type, {})
    for name, part in kind.sub_configs.items():
        if name == "text_config":
            values[name] = (
                _sized(CONFIG_MAPPING.get(part.model_type, part), SIZES)
                | SPECIAL.get(part.model_type, {})
                | values.get(name, {})
            )
        elif isinstance(part, type) and part is not PreTrainedConfig and part.model_type:
            values[name] = _sized(part, VISION)
    return kind(**values, **PUBLISHED.get(model_type, {}))


def _sized(kind: type[PreTrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    return {
        name: value for name, value in sizes.items() if name in fields and kind.attribute_map.get(name) not in sizes
    }


def small_model(model_type: str, *, policy: bool = False, **changes: Any) -> tuple[PreTrainedModel, bool]:
    """A random model in fp32 with eager attention, and whether it has a score head; otherwise, and a ``policy``, is causal.

    ``changes`` are keys of its config.
    """
    config = small_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    classifies = model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not policy
    if classifies:
        config.num_labels = 1
    auto = AutoModelForImageTextToText if model_type in SEEING else AutoModelForCausalLM
    auto = AutoModelForSequenceClassification if classifies else auto
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so that what layers do is seen in scores
                if parameter.dim() >= 2 and parameter.std() < 0.05:
                    parameter.mul_(5)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(CORRECTIONS):  # zero in a fresh model, and in none that was trained
                    tensor.normal_(std=0.1)
    return model, classifies
