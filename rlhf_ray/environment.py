"""Switches that hold for every process of a run, set in one place.

Always true: usage reports of Ray and vLLM are off, and no process asks a model hub for anything unless a config names a
hub id. ``for_process`` is pure; ``prepare`` applies it to the current process before heavy libraries are imported.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping
from typing import Literal

Device = Literal["cpu", "cuda"]

KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KERNELS_KEPT = 512
"""oneDNN keeps a kernel of a megabyte or more for every shape of a half-precision product, a thousand of them by default.
Packs differ in their lengths, so that a process would grow for hours. A pass over 50,000 tokens needs about 400."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's ``mallopt``: free bytes above which a heap shrinks, bytes by which it grows at least, and the size from which a
block is mapped alone."""
MEMORY_KEPT = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 64 << 20}
"""The largest that it takes, and as much as one heap of a thread has."""


def accelerator() -> Device:
    """``cuda`` where NVIDIA's driver answers, else ``cpu``; without importing torch."""
    return "cuda" if shutil.which("nvidia-smi") is not None else "cpu"


def for_process(*, threads: int = 1, hub: bool = False, device: Device | None = None) -> dict[str, str]:
    """Environment variables of one process.

    ``threads`` bounds its compute threads, ``hub`` allows downloads, ``device`` is what it computes on (default: what this
    machine has; a driver decides for the machines of its ranks).
    """
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0" if hub else "1",
        "TRANSFORMERS_OFFLINE": "0" if hub else "1",
        "HF_DATASETS_OFFLINE": "0" if hub else "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if (device or accelerator()) == "cpu":
        variables |= {"DS_ACCELERATOR": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": ""}
        variables |= dict.fromkeys(KERNEL_CACHES, str(KERNELS_KEPT))
    return variables


def prepare(variables: Mapping[str, str] | None = None) -> None:
    """Apply ``variables`` (default: ``for_process()``) to this process; what the user has set already stays."""
    for name, value in (for_process() if variables is None else variables).items():
        os.environ.setdefault(name, value)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as ``org/name`` and is not a path on this machine."""
    parts = name.split("/")
    plain = len(parts) == 2 and all(parts) and not name.startswith((".", "~"))
    return plain and not os.path.exists(name)


def keep_freed_memory() -> None:
    """What this process frees stays with it, where glibc allocates.

    A pass of a model frees and asks for the same large blocks again and again; the system would hand their pages out anew,
    one fault at a time, which costs a twentieth of a forward pass on CPU.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have none, or none that does anything
        for option, value in MEMORY_KEPT.items():
            library.mallopt(option, value)
