"""DeepSpeed's configuration."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.engine import deepspeed_config
from rlhf_ray.engine.engine import largest_layer
from rlhf_ray.errors import RequestError

OPTIMIZER = {"learning_rate": 1e-3, "max_grad_norm": 0.7}


def settings(zero: int, dtype: str, *, trained: bool = True, offload: str = "none") -> dict[str, Any]:
    config = EngineConfig.model_validate({"zero": zero, "offload": offload, "optimizer": OPTIMIZER})
    return deepspeed_config(config, dtype=dtype, trainable=trained, world_size=4)


@pytest.mark.parametrize(("zero", "dtype"), list(product(range(4), ("bf16", "fp32"))))
def test_accumulation_and_updates_belong_to_the_engine(zero: int, dtype: str) -> None:
    config = settings(zero, dtype)
    assert config["managed_gradient_accumulation"] is False and config["gradient_accumulation_steps"] == 1
    assert config["train_batch_size"] == 4 * config["train_micro_batch_size_per_gpu"]
    assert config["zero_allow_untested_optimizer"] and not config["zero_force_ds_cpu_optimizer"]
    assert "overlap_comm" in config["zero_optimization"] or zero in (0, 3)
    assert "optimizer" not in config and "scheduler" not in config


@pytest.mark.parametrize("zero", range(4))
def test_gradients_are_clipped_in_one_place(zero: int) -> None:
    assert settings(zero, "fp32")["gradient_clipping"] == (0.7 if zero else 0.0)  # at 0 the optimizer clips
    assert settings(zero, "bf16")["gradient_clipping"] == 0.7


@pytest.mark.parametrize(("zero", "sums"), [(0, False), (1, False), (2, True), (3, True)])
def test_low_precision_gradients_are_summed_in_fp32(zero: int, sums: bool) -> None:
    assert ("data_types" in settings(zero, "bf16")) == sums  # below 2 the engine sums
    assert "data_types" not in settings(zero, "fp32")


LAYERS = {"Llama-3-8B": (4096, 14336, 8), "Llama-3-70B": (8192, 28672, 8), "Llama-3.1-405B": (16384, 53248, 8)}
"""Hidden size, width of the MLP, and number of key heads, each of 128 numbers."""


@pytest.mark.parametrize("model", LAYERS)
def test_zero_3_fetches_a_layer_ahead_and_keeps_one_from_its_second_forward_to_its_backward(model: str) -> None:
    """With DeepSpeed's defaults one matrix of a layer of 70B is fetched ahead, and one of 405B is gathered once more."""
    hidden, width, heads = LAYERS[model]
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=8, hidden_size=hidden, intermediate_size=width, num_hidden_layers=2,
            num_attention_heads=hidden // 128, num_key_value_heads=heads, head_dim=128,
        )  # fmt: skip
        layer = largest_layer(AutoModelForCausalLM.from_config(config))
    assert layer == 2 * hidden * (hidden + heads * 128) + 3 * hidden * width + 2 * hidden
    engine = EngineConfig.model_validate({"zero": 3, "optimizer": OPTIMIZER})
    made = deepspeed_config(engine, dtype="bf16", trainable=True, world_size=4, layer=layer)
    zero = DeepSpeedZeroConfig(**made["zero_optimization"])
    assert zero.prefetch_bucket_size >= layer
    assert min(zero.max_live_parameters, zero.max_reuse_distance) >= 2 * layer
    assert zero.max_live_parameters <= max(10**9, 2 * layer)  # what is kept takes memory


@pytest.mark.parametrize("zero", [1, 2])
def test_sharding_an_optimizer_that_is_not_there_is_refused(zero: int) -> None:
    with pytest.raises(RequestError, match="set it to 0 or 3"):
        settings(zero, "bf16", trained=False)


def test_fp16_without_loss_scaling_is_refused() -> None:
    with pytest.raises(RequestError, match="does not scale the loss"):
        settings(0, "fp16")
    assert settings(1, "fp16")["fp16"]["enabled"] and settings(0, "fp16", trained=False)


def test_a_trained_model_needs_an_optimizer() -> None:
    with pytest.raises(RequestError, match=r"engine\.optimizer is missing"):
        deepspeed_config(EngineConfig(), dtype="fp32", trainable=True, world_size=1)


def test_offloading_says_where() -> None:
    zero = settings(3, "bf16", offload="all")["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert "offload_param" not in settings(2, "bf16", offload="optimizer")["zero_optimization"]
    assert "offload_optimizer" not in settings(3, "bf16", trained=False, offload="all")["zero_optimization"]
