"""A value of a config.json that no model has is a problem by name, whichever rule would have read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.files.config_values import readable, wrong_values
from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.preflight import check_files
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import Checkpoint

LLAMA = {"model_type": "llama", "hidden_size": 32}
WRONG: dict[str, tuple[Any, str]] = {
    "model_type": (["llama"], "must be text"),
    "value_head_prefix": (3, "must be text"),
    "quantization_config": ("gptq", "must be an object"),
    "rope_parameters": ([1], "must be an object"),
    "rope_scaling": ("yarn", "must be an object"),
    "text_config": ([1], "must be an object"),
    "architectures": ("LlamaForCausalLM", "must be a list of texts"),
    "layer_types": ([1], "must be a list of texts"),
    "max_position_embeddings": ("128", "must be a whole number or a number"),
    "n_positions": (True, "must be a whole number"),
    "original_max_position_embeddings": ("16", "must be a whole number"),
    "vocab_size": ("32", "must be a whole number"),
    "num_hidden_layers": (0, "must be 1 or more"),
    "std": ("wide", "must be a whole number or a number"),
}


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(config))
    (directory / "model" / "model.safetensors").write_bytes(b"")
    (directory / "model" / "tokenizer.json").write_text("{}")
    return directory / "model"


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("trained", [False, True])
def test_check_names_the_key_and_no_rule_fails(tmp_path: Path, key: str, trained: bool) -> None:
    value, message = WRONG[key]
    model = write(tmp_path, LLAMA | {key: value})
    text = f"reward: {{model: {{path: {model}, dtype: fp32}}}}\nrun: {{name: small}}\n"
    if trained:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": "one", "chosen": "two", "rejected": "three"}))
        batch = "batch: {pairs_per_update: 1, max_tokens_per_micro_batch: 128}"
        text += f"kind: rm\ndata: {{path: {rows}, max_tokens: 64, evaluation_fraction: 0}}\n{batch}\n"
    else:
        text += "kind: serve\n"
    sentence = f"reward.model.path: {model}: {key} is {json.dumps(value)} in its config.json, but {message}"
    assert any(problem.startswith(sentence) for problem in check_files(parse_config(text)))


def test_a_run_says_the_same(tmp_path: Path) -> None:
    config = LLAMA | {"rope_scaling": "yarn"}
    model = write(tmp_path, config)
    (sentence,) = wrong_values(config)
    with pytest.raises(ModelLoadError) as raised:
        Checkpoint(model, {}).config()
    assert sentence in str(raised.value)


def test_what_transformers_refuses_is_no_stack_trace(tmp_path: Path) -> None:
    """Its own errors about values are none of Python's kinds."""
    for number, odd in enumerate(({"tie_word_embeddings": "yes"}, {"dtype": "banana"}, {"num_attention_heads": 3})):
        (tmp_path / str(number)).mkdir()
        model = write(tmp_path / str(number), LLAMA | odd)
        with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
            Checkpoint(model, {}).config()


def test_what_is_left_of_a_config_has_no_null_and_no_wrong_value() -> None:
    inner = {"max_position_embeddings": "8", "hidden_size": 4}
    config = LLAMA | {"value_head_prefix": None, "rope_scaling": "yarn", "text_config": inner, "std": 1}
    assert readable(config) == LLAMA | {"text_config": {"hidden_size": 4}, "std": 1}


def test_every_config_of_transformers_is_right() -> None:
    from transformers import CONFIG_MAPPING

    made = 0
    for kind in CONFIG_MAPPING:
        try:
            written = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        except Exception:  # it has no defaults
            continue
        made += 1
        assert wrong_values(written) == [], kind
    assert made > 300
