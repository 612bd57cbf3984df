"""Weights in 4 bits (NF4 with double quantisation), as QLoRA holds the frozen base (Dettmers et al. 2023, arXiv:2305.14314).

Invariants: weights in 4 bits are frozen, and are never an embedding, an output layer, a head or the experts of a mixture
(3-D parameters, which bitsandbytes does not support). A layer computes with its dequantised weight, in training and in
evaluation alike. Weights that leave the model are dequantised.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlhf_ray.errors import ModelLoadError

INSTALL = "pip install bitsandbytes"


def bitsandbytes() -> ModuleType | None:
    """Import bitsandbytes; return None if it is not installed.

    If the package ``kernels`` is installed, bitsandbytes would fetch compiled kernels from a hub during its import. So that
    package is hidden from it meanwhile, and its warning about that is silenced.
    """
    if find_spec("bitsandbytes") is None:
        return None
    if "bitsandbytes" not in sys.modules:
        hidden = sys.modules.get("kernels", ...)
        logging.disable(logging.WARNING)
        cast(dict[str, ModuleType | None], sys.modules)["kernels"] = None
        try:
            import bitsandbytes as _  # noqa: F401
        finally:
            logging.disable(logging.NOTSET)
            del sys.modules["kernels"]
            if isinstance(hidden, ModuleType):
                sys.modules["kernels"] = hidden
    return sys.modules["bitsandbytes"]


def four_bit(dtype: torch.dtype, *, in_shards: bool) -> BitsAndBytesConfig:
    """Make the config with which transformers reads linear layers into 4 bits and computes with them in ``dtype``."""
    if in_shards:
        raise ModelLoadError(
            "4-bit (NF4) weights cannot be sharded (ZeRO-3): use ZeRO stage 2 or less, or leave quantization out"
        )
    if bitsandbytes() is None:
        raise ModelLoadError(
            f"4-bit (NF4) needs the package bitsandbytes, which is not installed: {INSTALL}, or load the model in bf16"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare_four_bit(model: nn.Module) -> None:
    """Freeze the whole model, and make its layers in 4 bits compute in evaluation as they do in training.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight at the first evaluation. The scales lose digits, so the
    outputs change, and from then on no gradient passes through the layer, not even in training.
    """
    model.requires_grad_(False)
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers in 4 bits, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if any(_is_four_bit(parameter) for parameter in layer.parameters(recurse=False))
    }


def dequantized(parameter: Tensor) -> Tensor:
    """Return the weight that a layer in 4 bits computes with; any other parameter as it is."""
    package = bitsandbytes() if _is_four_bit(parameter) else None
    if package is None:
        return parameter
    whole: Tensor = package.functional.dequantize_4bit(parameter.detach(), _quant_state(parameter))
    return whole


def dequantized_like(parameter: Tensor) -> Tensor | None:
    """Return a tensor without data that has the shape and dtype of the dequantised weight; None if it is not in 4 bits."""
    if not _is_four_bit(parameter):
        return None
    state = _quant_state(parameter)
    return torch.empty(state.shape, dtype=state.dtype, device="meta")


def _quant_state(parameter: Any) -> Any:
    """Return bitsandbytes' record of how a 4-bit parameter was quantised."""
    return parameter.quant_state


def _is_four_bit(parameter: object) -> bool:
    return isinstance(parameter, Tensor) and type(parameter).__name__ == "Params4bit"
