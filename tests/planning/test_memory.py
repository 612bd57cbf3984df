"""The formulas of memory: their constants are the libraries', parts add up to peaks, models are read from their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.engine.settings import deepspeed_config
from rlhf_ray.models.forward.log_prob_blocks import KEPT_BYTES
from rlhf_ray.planning.job_memory import job_memory
from rlhf_ray.planning.memory import (
    BUCKET,
    LIVE,
    SUB_GROUP,
    Part,
    cache_of_a_token,
    engine_parts,
    head_parts,
    kept_parts,
    peak,
    pinned,
    sampling_parts,
    total,
)
from rlhf_ray.planning.model_size import ModelSize, model_size

B = 10**9
SIZE = ModelSize(
    numbers=8 * B, trained=8 * B, four_bit=0, vectors=0, largest=B // 2, layers=32, hidden=4096, width=14336, query=4096,
    key_value=1024, vocabulary=128256, normed_heads=False, key_value_heads=8,
)  # fmt: skip


def engine(zero: int, offload: str = "none") -> EngineConfig:
    return EngineConfig.model_validate({"zero": zero, "offload": offload, "optimizer": {"learning_rate": 1e-6}})


def test_the_sizes_of_buffers_are_those_that_the_engine_sets() -> None:
    settings = deepspeed_config(engine(3), dtype="bf16", trainable=True, world_size=2)
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert (zero.reduce_bucket_size, zero.max_live_parameters, zero.sub_group_size) == (BUCKET, LIVE, SUB_GROUP)


@pytest.mark.parametrize(("numbers", "layer"), [(8 * B, 218_112_000), (70.6 * B, 855_654_400)])
def test_the_whole_weights_of_zero_3_are_those_that_its_settings_allow_and_one_more(numbers: float, layer: int) -> None:
    """A layer is estimated from all numbers, those of the embedding included: 3 % too large at 70B."""
    settings = deepspeed_config(engine(3), dtype="bf16", trainable=True, world_size=2, layer=layer)
    allowed = DeepSpeedZeroConfig(**settings["zero_optimization"]).max_live_parameters + SIZE.largest
    size = ModelSize(**{**vars(SIZE), "numbers": int(numbers), "trained": 0, "layers": 80 if numbers > 9 * B else 32})
    (gathered,) = (part for part in engine_parts(size, engine(3), "bf16", 2) if part.what == "gathered weights")
    assert gathered.bytes == pytest.approx(2 * allowed, rel=0.05)


def test_a_peak_is_the_phase_in_which_most_is_held() -> None:
    parts = [
        Part("weights", "GPU", 2), Part("activations", "GPU", 5, ("backward",)), Part("gradients", "GPU", 4, ("step",)),
        Part("optimizer", "host", 100, ("rest",)), Part("gradients", "GPU", 3, ("backward",)),
    ]  # fmt: skip
    phase, there = peak(parts, "GPU")
    assert phase == "backward" and [part.bytes for part in there] == [2, 5, 3]
    assert total(parts, "GPU") == 10 and total(parts, "host") == 100 and total([], "GPU") == 0


@pytest.mark.parametrize(("count", "block"), [(0, 0), (1, 1), (4, 4), (5, 8), (17.6e9, 2**35)])
def test_a_pinned_block_is_the_next_power_of_two(count: float, block: float) -> None:
    assert pinned(count) == block


def test_an_offloaded_optimizer_leaves_the_gpu_and_its_gradients_are_rounded_up() -> None:
    parts = list(engine_parts(SIZE, engine(3, "optimizer"), "bf16", 2))
    host = {part.what: part.bytes for part in parts if part.where == "host"}
    assert host == {"optimizer": 4 * B * 12, "gradients": 2**34 + 4 * 2**32}
    assert not any(part.what == "optimizer" for part in parts if part.where == "GPU")
    weights = [part.where for part in engine_parts(SIZE, engine(3, "all"), "bf16", 2) if part.what == "weights"]
    assert weights == ["host"]


def test_a_frozen_model_has_weights_alone_and_a_score_head_no_logits() -> None:
    frozen = ModelSize(**{**vars(SIZE), "trained": 0, "vocabulary": 0})
    assert [part.what for part in engine_parts(frozen, EngineConfig(), "bf16", 1)] == ["weights"]
    assert not list(head_parts(frozen, "bf16", trains=False))


def test_a_policy_on_a_cpu_keeps_probabilities_of_a_micro_batch_up_to_the_bound_of_its_head() -> None:
    vocabulary = SIZE.vocabulary

    def kept(training: int) -> list[tuple[str, float]]:
        return [(part.what, part.bytes) for part in kept_parts(SIZE, "bf16", training=training)]

    assert kept(100) == [("probabilities", 100 * vocabulary * 2)]
    assert kept(10_000_000) == [("probabilities", KEPT_BYTES)], "smaller micro-batches than the largest fill the bound"
    assert kept(0) == [] and not list(kept_parts(replace(SIZE, vocabulary=0), "bf16", training=100))


@pytest.mark.parametrize("role", ["policy", "critic", "reference"])
def test_plan_counts_them_where_a_policy_trains_on_a_cpu_alone(tmp_path: Path, role: str) -> None:
    path = write_model(tmp_path / "model")

    def parts(*overrides: str) -> dict[str, float]:
        models = [f"{one}.model={{path: {path}}}" for one in ("policy", "reference")]
        models.append(f"critic.model={{path: {path}, head_init: hf}}")
        memory = job_memory(load_config("demo-ppo", [*models, *overrides]))
        (found,) = (one for one in memory if one.role == role)
        return {part.what: part.bytes for part in found.parts}

    on_cpu, on_gpu = parts(), parts(f"{role}.resources.gpus_per_rank=1")
    assert on_cpu["weights"] and on_gpu["weights"]
    assert (on_cpu.get("probabilities", 0) > 0) is (role == "policy")
    assert "probabilities" not in on_gpu
    assert "probabilities" not in parts("algorithm.entropy_coefficient=0.01"), "an entropy in the loss keeps none"


def test_a_rollout_engine_splits_weights_and_cache_over_its_gpus() -> None:
    one, four = (
        {part.what: part.bytes for part in sampling_parts(
            SIZE, "bf16", tensor_parallel=parallel, tokens=8192, longest=2048, sequences=256
        )}
        for parallel in (1, 4)
    )  # fmt: skip
    assert one["weights"] == 16 * B and four["weights"] == 4 * B
    assert one["KV cache"] == 2048 * 2 * 32 * 1024 * 2 and four["KV cache"] == one["KV cache"] / 4
    assert cache_of_a_token(SIZE, "bf16", 16) == cache_of_a_token(SIZE, "bf16", 8), "16 GPUs hold each of 8 heads twice"


def write_model(directory: Path, *, tied: bool = False) -> Path:
    """A model of one layer: the header of its weights, and its config."""
    shapes = {"model.embed_tokens.weight": [100, 8], "lm_head.weight": [100, 8], "model.norm.weight": [8]}
    layer = {"self_attn.q_proj": [16, 8], "self_attn.k_proj": [8, 8], "self_attn.q_norm": [4], "mlp.up_proj": [32, 8]}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}).encode()
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    widths = {
        "model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 100, "tie_word_embeddings": tied,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(widths))
    return directory


def test_a_model_is_measured_by_the_headers_of_its_files_and_its_config(tmp_path: Path) -> None:
    path, tied = write_model(tmp_path / "model"), write_model(tmp_path / "tied", tied=True)
    layer = 16 * 8 + 8 * 8 + 32 * 8

    def size(role: str, model: str) -> ModelSize:
        found = model_size(load_config("demo-ppo", [f"{role}.model={{path: {model}}}"]).roles()[role])
        assert found is not None
        return found

    policy = size("policy", str(path))
    assert (policy.numbers, policy.trained, policy.vectors) == (layer + 12 + 1600, layer + 12 + 1600, 12)
    assert (policy.query, policy.key_value, policy.width, policy.vocabulary) == (16, 8, 32, 100)
    assert policy.normed_heads and policy.largest == 800
    assert size("policy", str(tied)).numbers == layer + 12 + 800, "a tied weight counts once"
    assert size("critic", f"{path}, head_init: hf").numbers == layer + 12 + 800, "a critic has no output layer"
    assert size("reference", str(path)).trained == 0
    lora = size("policy", f"{path}, quantization: nf4, lora: {{rank: 2}}")
    assert lora.trained == 2 * (24 + 16 + 40) and lora.frozen == policy.numbers and lora.four_bit == layer


def test_a_model_that_is_not_here_has_no_size_and_one_that_is_made_has(tmp_path: Path) -> None:
    made = "critic.model={make: {shape: llama-14m, tokenizer_from: world}, head_init: inv_sqrt}"
    roles = load_config("demo-ppo", [f"policy.model={{path: {tmp_path / 'away'}}}", made]).roles()
    assert model_size(roles["policy"]) is None
    critic = model_size(roles["critic"])
    assert critic is not None and critic.layers == 6 and critic.numbers == critic.trained > 10_000_000
