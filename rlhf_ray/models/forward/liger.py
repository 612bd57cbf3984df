"""Liger's Triton kernels for norms, rotary positions and MLPs, on a GPU.

Always true: the output layer and the loss stay this project's own (log-probs in chunks); where the kernels cannot run,
asking for them is an error that says why.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_liger_kernel_available

from rlhf_ray.errors import ModelLoadError

OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def liger_obstacle() -> str | None:
    """Why Liger's kernels cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not is_liger_kernel_available():
        return "the package liger-kernel is not installed (pip install liger-kernel)"
    return None


def use_liger(model: PreTrainedModel) -> None:
    """Put the kernels into the model, in place."""
    reason = liger_obstacle()
    if reason is not None:
        raise ModelLoadError(f"Liger kernels cannot be used here: {reason}. Leave use_liger_kernel off")
    from transformers.integrations.liger import apply_liger_kernel  # slow to import

    apply_liger_kernel(model, OURS)
