"""Make DeepSpeed's configuration from the engine section of a config.

Invariants: DeepSpeed never decides when an update happens, never scales a loss and never mixes the gradients of two updates.
:class:`rlhf_ray.engine.engine.Engine` accumulates micro-batches, and DeepSpeed's own accumulation stays at 1. Combinations
that DeepSpeed accepts but gets wrong are refused here.
"""

from __future__ import annotations

from typing import Any, Literal

from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.errors import RequestError

WHOLE_BELOW = 10_000
"""Under ZeRO-3, parameters of at most this many elements (norms and biases) stay whole on every rank."""

BUCKET = 50_000_000
"""Elements sent at once. DeepSpeed allocates a buffer of this size up front, and its own default takes gigabytes."""

LIVE = 1_000_000_000
"""Elements of whole weights that ZeRO-3 may keep on a rank at least: DeepSpeed's own default, which fits small layers."""


def deepspeed_config(
    config: EngineConfig,
    *,
    dtype: Literal["bf16", "fp16", "fp32"],
    trainable: bool,
    world_size: int,
    whole_below: int = WHOLE_BELOW,
    layer: int = 0,
) -> dict[str, Any]:
    """Make the configuration of one DeepSpeed engine; ``zero.Init`` needs it too, to build a model in shards.

    ``layer`` is the number of elements in the largest layer of the model, from which follows what ZeRO-3 fetches ahead.
    """
    max_grad_norm = _check(config, dtype=dtype, trainable=trainable)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_in_optimizer(config, dtype) else max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_settings(config, trainable, whole_below, layer),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if casts_in_engine(config, trainable):
        return settings
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if dtype == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 1}
    if dtype != "fp32" and trainable and config.zero >= 2:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def casts_in_engine(config: EngineConfig, trainable: bool) -> bool:
    """Return whether :class:`Engine` casts the parameters instead of DeepSpeed.

    It does for a model that is neither trained nor sharded: DeepSpeed would make an empty optimizer and print about it.
    """
    return not trainable and config.zero == 0


def sums_in_engine(config: EngineConfig, dtype: str) -> bool:
    """Return whether :class:`Engine` adds up micro-batches: at ZeRO 0 and 1 DeepSpeed would add them in low precision.

    At ZeRO 1 in bf16 DeepSpeed can sum in fp32, but only with another optimizer of its own, which prints dozens of lines.
    """
    return dtype != "fp32" and config.zero < 2


def clips_in_optimizer(config: EngineConfig, dtype: str) -> bool:
    """Return whether whole fp32 gradients reach the optimizer, so that it clips them and skips NaN and Inf itself."""
    return config.zero == 0 and dtype == "fp32"


def _zero_settings(config: EngineConfig, trainable: bool, whole_below: int, layer: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": BUCKET}
    if config.zero in (1, 2):
        zero["overlap_comm"] = False
    if config.zero == 3:
        zero["stage3_param_persistence_threshold"] = whole_below
        zero |= _gathering(layer)
    if config.offload != "none" and trainable:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return zero


def _gathering(layer: int) -> dict[str, int]:
    """Let ZeRO-3 gather a layer ahead, beside the one that runs, and keep one from its second forward to its backward.

    A layer is larger than DeepSpeed's defaults from about 70B on: then hardly any weight is fetched before it is needed. The
    second forward is that of gradient checkpointing; between it and the backward lie two passes over the layer.
    """
    live = max(LIVE, 2 * layer)
    return {
        "stage3_prefetch_bucket_size": max(BUCKET, layer),
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }


def _check(config: EngineConfig, *, dtype: str, trainable: bool) -> float:
    """Refuse combinations that cannot work; return the largest gradient norm in training, and 0 otherwise."""
    if not trainable:
        if config.zero in (1, 2):
            raise RequestError(
                f"engine.zero is {config.zero}, which shards an optimizer, but this model is not trained: set it to 0 or 3"
            )
        return 0.0
    if config.optimizer is None:
        raise RequestError("engine.optimizer is missing, but this model is trained: set engine.optimizer.learning_rate")
    if dtype == "fp16" and config.zero == 0:
        raise RequestError(
            "fp16 at engine.zero 0 does not scale the loss in DeepSpeed: set it to 1, 2 or 3, or use bf16"
        )
    return config.optimizer.max_grad_norm
