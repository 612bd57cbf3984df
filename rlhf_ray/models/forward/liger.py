"""Liger's Triton kernels for norms, rotary positions and MLPs, on a GPU.

Invariants: the output layer and the loss stay this project's own, which compute log-probs in chunks. If the kernels cannot
run, asking for them is an error that says why.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from rlhf_ray.errors import ModelLoadError

KERNELS_LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def liger_obstacle(device: torch.device) -> str | None:
    """Return why Liger's kernels cannot run on ``device``, or None if they can."""
    if device.type != "cuda":
        return f"they run on GPUs only, not on the {device.type.upper()}"
    if not is_liger_kernel_available():
        return "the package liger-kernel is not installed (pip install liger-kernel)"
    return None


def use_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Replace norms, rotary positions and MLPs of the model, which computes on ``device``, by Liger's, in place."""
    reason = liger_obstacle(device)
    if reason is not None:
        raise ModelLoadError(f"Liger kernels cannot be used here: {reason}. Leave use_liger_kernel off")
    from transformers.integrations.liger import apply_liger_kernel  # slow to import

    apply_liger_kernel(model, KERNELS_LEFT_OUT)
