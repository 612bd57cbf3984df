"""The device of a rank: what it was placed on, held against what torch sees there.

Invariants: a rank computes on the device that it was placed on, or is refused before anything is allocated. No other module
asks torch or the driver whether there is a GPU, except for those that count the GPUs of a machine before anything is placed
(:mod:`rlhf_ray.planning.gpus`) and that describe it (``rlhf-ray doctor``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.errors import CapacityError

CPU = torch.device("cpu")
GB = 1e9


def placed_device(resources: ResourcesConfig, role: str) -> torch.device:
    """torch's name of the device that a rank of ``role`` was placed on: of its GPUs the first.

    Raises :class:`CapacityError` if the rank was placed on more GPUs than torch sees in this process.
    """
    if resources.device == "cpu":
        return CPU
    placed, seen = math.ceil(resources.gpus_per_rank), torch.cuda.device_count()
    if seen < placed:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "not set" if visible is None else repr(visible)
        raise CapacityError(
            f"the {role} was placed on {resources.gpus_per_rank:g} GPU (resources.gpus_per_rank), but torch "
            f"{torch.__version__} sees {seen} in its process (CUDA_VISIBLE_DEVICES is {shown}): install the CUDA build on that "
            "node (the head of requirements/gpu.txt says how) and a driver for it, or set gpus_per_rank to 0 to compute on "
            "the CPU"
        )
    return torch.device("cuda", 0)


def limit_memory(device: torch.device, share: float) -> None:
    """Let this process allocate at most ``share`` of the memory of its GPU, where it shares one (``share`` is below 1).

    What goes beyond it is then the error of the role that asked for it, not of another one on that GPU. Has not run on a GPU
    yet.
    """
    if device.type == "cuda" and share < 1:
        torch.cuda.set_per_process_memory_fraction(share, device)


@dataclass(frozen=True)
class GpuPeak:
    """The most memory of a GPU that one process took of it, in GB (1e9 bytes)."""

    allocated_gb: float
    """In tensors."""
    reserved_gb: float
    """In all that torch's allocator holds, free blocks included."""


def take_peak(device: torch.device) -> GpuPeak | None:
    """The peak of this process since the last call; None on the CPU. Has not run on a GPU yet."""
    if device.type != "cuda":
        return None
    gpu_memory()
    peak = GpuPeak(torch.cuda.max_memory_allocated(device) / GB, torch.cuda.max_memory_reserved(device) / GB)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


_most: dict[int, float] = {}
"""The most that torch held of each GPU before its own record of that was last reset, in GB."""


def gpu_memory() -> tuple[float, float] | None:
    """What torch holds of all GPUs of this process now, and the most of it so far, in GB; None where it has opened none.

    This opens none either. Has not run on a GPU yet.
    """
    if not torch.cuda.is_initialized():
        return None
    gpus = range(torch.cuda.device_count())
    for gpu in gpus:
        _most[gpu] = max(_most.get(gpu, 0.0), torch.cuda.max_memory_reserved(gpu) / GB)
    return sum(torch.cuda.memory_reserved(gpu) for gpu in gpus) / GB, sum(_most[gpu] for gpu in gpus)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from ``seed`` in the block; the generators of the CPU and of ``device`` are afterwards as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
