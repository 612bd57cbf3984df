"""What the device could do at best: the rate of one large matrix product, against which training is held.

Always true: it is measured here and now, never taken from a data sheet.
"""

from __future__ import annotations

import time

import torch

SECONDS = 0.4
SIZES = {"cpu": 1536, "cuda": 8192}


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of ``size x size`` products in ``dtype``, over about ``SECONDS`` after one that is not counted."""
    size = SIZES.get(device.type, SIZES["cpu"])
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    _multiply(left, right, device)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        _multiply(left, right, device)
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - begin)


def _multiply(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> None:
    left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
