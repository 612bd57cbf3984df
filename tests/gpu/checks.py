"""The checks of ``make gpu``, in the order in which they run: what a failure would spoil first, then what takes long.

Always true: a check is named here without importing what it needs. It is a function of this package that takes a device
and :class:`tests.gpu.sizes.Sizes`, raises where something is not so, and returns what it has to say, or figures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Figures
from rlhf_ray.environment import Device
from tests.gpu.sizes import Sizes

MODELS = ("device", "transformers", "jaxtyping", "rich", "pydantic")
"""What running a model of this project needs."""
ENGINE = (*MODELS, "deepspeed")
STACK = (*ENGINE, "cuda kernel", "ray", "vllm")

Findings = str | Figures | tuple[Figures, str]
"""What a check has to say, what it measured, or both."""


class FoundWrong(AssertionError):
    """Something is not so, and what was measured is worth keeping."""

    def __init__(self, message: str, figures: Figures) -> None:
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True)
class Check:
    """One thing to see: ``function`` of ``module`` in ``tests.gpu``, called with ``options``."""

    name: str
    needs: tuple[str, ...]
    module: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 60.0
    """Seconds after which it has failed, its imports included."""

    def run(self, device: Device, sizes: Sizes) -> Findings:
        """Do it here and now."""
        function: Callable[..., Findings] = getattr(importlib.import_module(f"tests.gpu.{self.module}"), self.function)
        return function(device, sizes, **self.options)


def _attention(name: str, attention: str, dtype: str, *needs: str) -> Check:
    return Check(
        name, (*MODELS, *needs), "agreement", "attention_agrees", {"attention": attention, "dtype_name": dtype}
    )


CHECKS = (
    Check("device", ("device",), "device", "device_figures", limit_s=120.0),
    _attention("packed_varlen_equals_padded", "varlen", "bfloat16"),
    _attention("packed_segments_equal_padded_fp32", "sdpa", "float32"),
    _attention("packed_segments_equal_padded_bf16", "sdpa", "bfloat16"),
    _attention("packed_flash_attention_2_equals_padded", "flash_attention_2", "bfloat16", "cuda kernel", "flash_attn"),
    Check("chunked_log_probs_equal_naive_fp32", MODELS, "agreement", "log_probs_agree", {"dtype_name": "float32"}),
    Check("chunked_log_probs_equal_naive_bf16", MODELS, "agreement", "log_probs_agree", {"dtype_name": "bfloat16"}),
    Check("log_prob_kernels_equal_plain", (*MODELS, "cuda kernel"), "agreement", "log_prob_kernels_agree"),
    Check("nf4_equals_its_dequantised_weights", (*MODELS, "bitsandbytes", "peft"), "agreement", "four_bit_agrees"),
    Check("liger_equals_plain", (*MODELS, "cuda kernel", "liger_kernel"), "agreement", "liger_agrees"),
    Check("models_load", (*MODELS, "peft"), "loaders", "models_load", limit_s=90.0),
    Check("four_bit_models_load", (*MODELS, "bitsandbytes", "peft"), "loaders", "four_bit_models_load"),
    *(
        Check(
            f"engine_at_zero_{zero}_trains_as_plain_adamw",
            ENGINE,
            "engines",
            "engine_trains_as_plain_adamw",
            {"zero": zero},
            limit_s=90.0,
        )
        for zero in (0, 2, 3)
    ),
    *(
        Check(f"memory_at_zero_{zero}_follows_formulas", ENGINE, "memory", "memory_follows_formulas", {"zero": zero})
        for zero in (0, 2, 3)
    ),
    Check("weights_cross_processes", (*MODELS, "peft"), "publication", "weights_cross_processes"),
    Check("head_of_small_model", MODELS, "head", "head_figures", {"shape": "small"}),
    Check("head_of_large_model", MODELS, "head", "head_figures", {"shape": "large"}),
    Check("policy_of_small_model", MODELS, "throughput", "policy_of_small_model", limit_s=90.0),
    Check("policy_scoring_of_large_model", MODELS, "throughput", "policy_scoring_of_large_model", limit_s=90.0),
    Check("reward_lora_of_large_model", (*MODELS, "peft"), "throughput", "reward_lora_of_large_model", limit_s=120.0),
    Check("training_of_small_model", ENGINE, "engines", "training_of_small_model", limit_s=90.0),
    Check("training_of_large_model", ENGINE, "engines", "training_of_large_model", limit_s=120.0),
    Check("ppo_on_one_gpu", STACK, "stack", "train_ppo", {"gpus": 1}, limit_s=300.0),
    Check("ppo_by_turns_on_one_gpu", STACK, "stack", "train_ppo", {"gpus": 1, "by_turns": True}, limit_s=300.0),
    Check("ppo_on_two_gpus", (*STACK, "second GPU"), "stack", "train_ppo", {"gpus": 2}, limit_s=300.0),
)
