"""How many GPUs this machine offers and how large they are, before anything is placed on them.

Invariant: the number is that of CUDA itself, so ``CUDA_VISIBLE_DEVICES`` counts, and NVIDIA's management tools need not be
there: a container may have GPUs without ``nvidia-smi``. Nothing is allocated on them, and torch is not imported.
"""

from __future__ import annotations

import ctypes

DRIVER = "libcuda.so.1"
SUCCESS = 0


def gpu_bytes() -> int | None:
    """The memory of the smallest GPU that CUDA's driver shows to this process, in bytes; None where there is none.

    Has not run on a GPU yet.
    """
    sizes = []
    for index in range(count_gpus()):
        driver, device, size = ctypes.CDLL(DRIVER), ctypes.c_int(0), ctypes.c_size_t(0)
        if driver.cuDeviceGet(ctypes.byref(device), index) == SUCCESS:
            driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            sizes.append(size.value)
    return min((size for size in sizes if size), default=None)


def count_gpus() -> int:
    """The GPUs that CUDA's driver shows to this process; 0 where there is no driver."""
    return _ask("cuDeviceGetCount") or 0


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, such as (13, 0); none where there is no driver."""
    number = _ask("cuDriverGetVersion")  # 13000 for 13.0
    return None if number is None else (number // 1000, number % 1000 // 10)


def _ask(function: str) -> int | None:
    """The number that a function of the driver gives; none where it fails or there is no driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    number = ctypes.c_int(0)
    answers = driver.cuInit(0) == SUCCESS and driver[function](ctypes.byref(number)) == SUCCESS
    return number.value if answers else None
