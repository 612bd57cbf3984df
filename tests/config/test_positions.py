"""A model is trained, served and asked for log-probs up to the same length, under whichever name its config holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.config.files.positions import longest_sequence, too_long
from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.preflight import check_files

SMALL = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "gpt2", "n_positions": 64}, 64),
        ({"model_type": "opt", "max_position_embeddings": 48}, 48),
        ({"model_type": "dbrx", "max_seq_len": 32}, 32),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 40}, "max_position_embeddings": 7}, 40),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "llama", "max_position_embeddings": 100}, 100),
        ({"model_type": "mamba"}, None),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 128),
        ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 32),
        (
            {
                "max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            },
            128,
        ),
        (
            {
                "max_position_embeddings": 128,
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            256,
        ),
    ],
)
def test_what_a_config_says(config: dict[str, Any], longest: int | None) -> None:
    assert longest_sequence(config) == longest


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_bigcode", "opt", "biogpt", "gpt_neo"])
def test_learned_positions_end_where_the_config_says(model_type: str) -> None:
    """A model runs on that many tokens and on no more, so that a limit one too low or too high fails."""
    names = {"gpt2": "n_positions", "gpt_bigcode": "n_positions"}
    extra = {"attention_types": [[["global"], 1]]} if model_type == "gpt_neo" else {}
    sizes = SMALL | {names.get(model_type, "max_position_embeddings"): 24, **extra}
    config = AutoConfig.for_model(model_type, **sizes)
    longest = longest_sequence(config.get_text_config().to_dict())
    assert longest == 24
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, longest, dtype=torch.int64))
        with pytest.raises(Exception, match=r"index|range|size"):
            model(input_ids=torch.ones(1, longest + 1, dtype=torch.int64))


def test_a_limit_that_rope_can_move_is_said_with_the_key() -> None:
    rope = {"max_position_embeddings": 32, "rope_theta": 1e4}
    assert too_long(64, "m", 32, rope).endswith(
        "lower it to 32, or, if the model was trained on longer ones, raise max_position_embeddings in its config.json"
    )
    assert too_long(64, "m", 32, {"n_positions": 32}) == "64 is more than m reads: lower it to 32"


def test_check_sees_the_positions_of_an_adapters_base_and_of_a_text_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, config in {
        "base": {"model_type": "gpt2", "n_positions": 64},
        "seeing": {"model_type": "gemma3", "text_config": {"max_position_embeddings": 64}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    for name in ("base", "seeing", "adapter"):
        config = parse_config(texts["sft"], [f"policy.model={{path: {name}, dtype: fp32}}"])
        assert f"data.max_tokens: 512 is more than {name} (policy.model) reads: lower it to 64" in check_files(config)
