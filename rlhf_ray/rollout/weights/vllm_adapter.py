"""The LoRA adapter of a vLLM engine: one at a time, and another one with every version of the weights.

Invariants: an adapter has a new name with every version, so that no request takes it for an earlier one; it keeps its number,
by which vLLM computes, so that requests in work go on with the new one. Only vLLM's workers keep it: the directory is gone when
this returns. An adapter that vLLM refuses is an error before the first request.

vLLM 0.32 takes an adapter from a directory alone (``LoRARequest.lora_path``), so it is written to one in memory where there is
such. ``add_lora`` with ``load_inplace`` replaces the adapter of that number; without it the old one would stay. With tensor
parallelism, and on a GPU, this has not run yet.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from torch import Tensor
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from rlhf_ray.config.files.models import ADAPTER_CONFIG
from rlhf_ray.models.weights.adapters import WEIGHTS

MEMORY = "/dev/shm"
CONFIG = "adapter_config.json"
NUMBER = 1
RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
"""The sizes for which vLLM makes room."""


def adapter_arguments(rank: int) -> dict[str, Any]:
    """The arguments of an engine that takes adapters of up to ``rank``."""
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(size for size in RANKS if size >= rank)}


def load_adapter(engine: Any, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoRARequest:
    """Put an adapter in the place of the one before; returns what requests name to be computed with it.

    ``config`` and ``tensors`` are what PEFT keeps in a directory.
    """
    directory = Path(tempfile.mkdtemp(prefix="rlhf_ray_adapter_", dir=MEMORY if os.path.isdir(MEMORY) else None))
    try:
        (directory / ADAPTER_CONFIG).write_text(json.dumps(dict(config)), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
        if not engine.add_lora(LoRARequest(name, NUMBER, str(directory), load_inplace=True)):
            raise ValueError(f"vLLM did not take the adapter {name}")
        return LoRARequest(name, NUMBER, str(directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
