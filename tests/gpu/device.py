"""What this device is, and the rate that all shares refer to. Needs nothing but torch.

Always true: the rate is measured here and now.
"""

from __future__ import annotations

import torch

from benchmarks.figures import Figure, Figures
from rlhf_ray.engine.matmul_rate import matmul_rate
from rlhf_ray.environment import Device
from tests.gpu.sizes import Sizes


def device_figures(device: Device, sizes: Sizes) -> tuple[Figures, str]:
    """The rate of matrix products in bf16, which the shares of all other figures refer to, and what this device is."""
    rate = matmul_rate(torch.bfloat16, torch.device(device))
    figure = Figure(rate, "FLOP/s", True, "square matrix products of random numbers in bf16")
    if device == "cpu":
        return {"gpu.matmul_rate": figure}, f"torch {torch.__version__} on the CPU"
    properties = torch.cuda.get_device_properties(0)
    memory = Figure(properties.total_memory / 1e9, "GB", True, "what torch says that the GPU has")
    return {
        "gpu.matmul_rate": figure,
        "gpu.memory": memory,
    }, f"torch {torch.__version__}, CUDA {torch.version.cuda}, {properties.name}"
