"""The LoRA adapter of a vLLM engine: one at a time, and another one with every version of the weights.

Invariants: an adapter has a new name with every version, so that no request takes it for an earlier one; it keeps its number,
by which vLLM computes, so that requests in work go on with the new one. Only vLLM's workers keep it: the directory is gone when
this returns, and the next update on the same machine removes what a process left that died meanwhile. An adapter that vLLM
refuses is an error before the first request.

vLLM 0.32 takes an adapter from a directory alone (``LoRARequest.lora_path``), so it is written to one in memory where there is
such. ``add_lora`` with ``load_inplace`` replaces the adapter of that number; without it the old one would stay. With tensor
parallelism, and on a GPU, this has not run yet.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from safetensors import TensorSpec, serialize_file
from torch import Tensor
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from rlhf_ray.config.files.models import ADAPTER_CONFIG
from rlhf_ray.models.weights.adapters import WEIGHTS

MEMORY = "/dev/shm"
PREFIX = "rlhf_ray_adapter_"
SPARE = 1 << 20
"""Bytes for the header and the configuration."""
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
    with _directory(sum(tensor.nbytes for tensor in tensors.values())) as directory:
        (directory / ADAPTER_CONFIG).write_text(json.dumps(dict(config)), encoding="utf-8")
        _write(directory / WEIGHTS, {name: tensor.contiguous() for name, tensor in tensors.items()})
        if not engine.add_lora(LoRARequest(name, NUMBER, str(directory), load_inplace=True)):
            raise ValueError(f"vLLM did not take the adapter {name}")
        return LoRARequest(name, NUMBER, str(directory))


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are contiguous and on the CPU. ``save_file`` would first look for memory that several share."""
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, file)


@contextmanager
def _directory(nbytes: int) -> Iterator[Path]:
    """A directory for an adapter of ``nbytes``, in memory where there is room, which goes with the context.

    It is locked meanwhile: one that nobody holds was left by a process that has died.
    """
    parent = next((parent for parent in (MEMORY, tempfile.gettempdir()) if _free(parent) > nbytes + SPARE), None)
    if parent is None:
        raise OSError(
            f"an adapter of {nbytes / 1e6:.0f} MB has no room in {MEMORY} ({_free(MEMORY) / 1e6:.0f} MB free) nor in "
            f"{tempfile.gettempdir()} ({_free(tempfile.gettempdir()) / 1e6:.0f} MB free): free some, or set rollout.lora "
            "to merged, which needs none"
        )
    for left in Path(parent).glob(f"{PREFIX}*"):
        with _locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with _locked(directory) as ours:
            if ours and directory.is_dir():  # else another process took it for one that was left
                try:
                    yield directory
                finally:
                    shutil.rmtree(directory, ignore_errors=True)
                return


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether a directory could be locked, which it then is in this context."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone, or another user's
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _free(directory: str) -> int:
    """The bytes that may be written to a directory; 0 where there is none."""
    return shutil.disk_usage(directory).free if os.path.isdir(directory) else 0
