"""A plan says what a checkpoint weighs, in full and with LoRA, and how many lie on the disk (tests/actors writes some)."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.planning.arithmetic import batch_table
from rlhf_ray.planning.checkpoints import bytes_each, checkpoint_sizes, shapes_of, trained_numbers
from rlhf_ray.planning.job_memory import job_memory, role_size, weights_here

ADAPTED = 2 * 4 * (64 + 64 + 64 + 16)
"""Numbers of rank-4 adapters on q_proj (64, 64) and v_proj (16, 64) of two layers, times the two of them."""


def write_shapes(directory: Path) -> Path:
    """A model of two layers, as its header tells; no tensor is there."""
    layer = {"self_attn.q_proj": [64, 64], "self_attn.v_proj": [16, 64], "mlp.gate": [4, 64], "input_layernorm": [64]}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {f"model.layers.{i}.mlp.experts.{e}.up.weight": [32, 64] for i in range(2) for e in range(4)}
    shapes |= {"model.embed_tokens.weight": [100, 64], "lm_head.weight": [100, 64]}
    header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}).encode()
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return directory


def sizes(*overrides: str) -> dict[str, tuple[str, str]]:
    lines = checkpoint_sizes(load_config("demo-ppo", list(overrides)))
    return {line.what: (line.value, line.follows) for line in lines}


@pytest.mark.parametrize(
    ("dtype", "zero", "each"),
    [("bf16", 0, 14), ("bf16", 2, 14), ("bf16", 3, 12), ("fp32", 0, 12), ("fp32", 1, 16), ("fp32", 3, 12)],
)
def test_a_number_that_trains_weighs_what_deepspeed_writes_of_it(dtype: str, zero: int, each: int) -> None:
    config = load_config("demo-ppo", [f"policy.model.dtype={dtype}", f"policy.engine.zero={zero}"])
    assert bytes_each(config.roles()["policy"]) == each


def test_numbers_that_train_are_counted_from_the_headers_of_files(tmp_path: Path) -> None:
    path = write_shapes(tmp_path / "model")

    def count(role: str, model: str) -> int | None:
        return trained_numbers(load_config("demo-ppo", [f"{role}.model={{path: {path}{model}}}"]).roles()[role])

    layers = 2 * (64 * 64 + 16 * 64 + 4 * 64 + 64 + 4 * 32 * 64)
    assert count("policy", "") == layers + 2 * 100 * 64
    assert count("critic", ", head_init: hf") == layers + 100 * 64, "a critic has no output layer"
    assert count("policy", ", lora: {rank: 4}") == ADAPTED, "in a mixture attention alone"
    assert count("policy", ", lora: {rank: 4, targets: [v_proj]}") == 2 * 4 * (64 + 16)


@pytest.mark.parametrize("base_is_here", [True, False])
def test_an_adapter_is_as_large_as_its_base_and_itself(tmp_path: Path, base_is_here: bool) -> None:
    base = write_shapes(tmp_path / "base")
    widths = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    (base / "config.json").write_text(json.dumps(widths))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    belongs_to = {"base_model_name_or_path": str(base if base_is_here else tmp_path / "gone")}
    (adapter / "adapter_config.json").write_text(json.dumps(belongs_to))
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64),
         "base_model.model.score.weight": torch.zeros(1, 64)},
        adapter / "adapter_model.safetensors",
    )  # fmt: skip
    role = load_config("demo-ppo", [f"policy.model={{path: {adapter}}}"]).roles()["policy"]
    size = role_size(role, weights_here)
    if not base_is_here:
        assert size is None
        return
    assert size is not None
    whole = sum(prod(shape) for shape in shapes_of(ModelConfig(path=str(base))).values())
    assert (size.numbers, size.trained) == (whole + 4 * 64, 4 * 64)


def test_the_copy_that_is_written_in_the_background_is_what_the_first_rank_writes() -> None:
    model = "policy.model={make: {shape: llama-14m, tokenizer_from: world}, dtype: DTYPE}"

    def copy(dtype: str, zero: int, *settings: str) -> float | None:
        overrides = [model.replace("DTYPE", dtype), f"policy.engine.zero={zero}", "policy.ranks=2", *settings]
        memory = next(one for one in job_memory(load_config("demo-sft", overrides)) if one.role == "policy")
        return next((part.bytes for part in memory.parts if part.what == "checkpoint to write"), None)

    numbers = 10_800_768
    assert copy("bf16", 0) == 14 * numbers and copy("fp32", 0) == 12 * numbers
    assert copy("bf16", 2) == (2 + 12 / 2) * numbers and copy("fp32", 2) == (4 + 12 / 2) * numbers
    assert copy("bf16", 3) == 12 / 2 * numbers
    assert copy("bf16", 2, "checkpoint.background=false") is None
    assert copy("bf16", 0, "policy.model.lora={rank: 8}") == 14 * 350_208


def test_the_table_shows_each_role_and_all_that_lie_on_the_disk(tmp_path: Path) -> None:
    full = sizes("checkpoint.keep=3", "policy.model={make: {shape: llama-14m, tokenizer_from: world}, dtype: bf16}")
    assert full["policy: weight of a checkpoint"][0] == "about 151 MB"
    assert full["checkpoints on disk"][1].startswith("3 that are kept (checkpoint.keep), and one")
    lora = "policy.model={make: {shape: llama-14m, tokenizer_from: world}, dtype: bf16, lora: {rank: 8}}"
    assert sizes(lora)["policy: weight of a checkpoint"] == (
        "about 4.9 MB",
        "350208 numbers that train x 14 bytes of weight and optimizer: adapters and heads, without the frozen base",
    )
    away = sizes(f"policy.model.path={tmp_path / 'away'}", "policy.model.make=null")
    assert away["policy: weight of a checkpoint"] == ("not known yet", f"{tmp_path / 'away'} is not on this machine")
    assert away["checkpoints on disk"][0] == "not known yet"
    assert "weight of a checkpoint" in batch_table(load_config("demo-ppo"))
    assert list(checkpoint_sizes(load_config("serve"))) == []
