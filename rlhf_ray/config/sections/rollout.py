"""The ``rollout`` section: the engines that generate answers, and how tokens are sampled."""

from __future__ import annotations

from typing import Literal

from rlhf_ray.config.sections.base import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import Dtype


class RolloutConfig(Section):
    """The rollout engines and how they sample."""

    backend: Literal["vllm", "transformers"] = "vllm"
    engines: Positive = 1
    max_new_tokens: Positive = 32
    stop_tokens: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Tokens that end an answer, besides the tokenizer's end of sequence."""
    temperature: PositiveFloat = 1.0
    top_p: PositiveFloat = 1.0
    top_k: int = 0
    min_p: NonNegativeFloat = 0.0
    max_model_tokens: Positive = 512
    dtype: Dtype = "bf16"
    kv_cache_gib: PositiveFloat = 1.0
    tensor_parallel: Positive = 1
    gpu_memory_utilization: Fraction = 0.9
    weight_transport: Literal["auto", "object_store"] = "auto"
    resources: ResourcesConfig = ResourcesConfig()
    timeout_s: PositiveFloat = 300.0
