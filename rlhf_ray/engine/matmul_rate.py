"""The rate at which this device multiplies large matrices: the most that training could reach.

Invariant: the rate is measured here and now, never taken from a data sheet.
"""

from __future__ import annotations

import time

import torch

SECONDS = 0.4
"""Time that the measurement takes at least."""
SIZES = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the matrices, by type of device."""


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of square matrix products in ``dtype``, measured over about :data:`SECONDS` after a warm-up."""
    size = SIZES.get(device.type, SIZES["cpu"])
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    _multiply(left, right, device)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        _multiply(left, right, device)
        count += 1
    # A product takes size**3 multiplications and as many additions.
    return 2.0 * size**3 * count / (time.perf_counter() - begin)


def _multiply(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> None:
    left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
