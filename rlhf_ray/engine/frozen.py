"""Weights that a training engine does not train: which they are, and whether they are still those of before.

Invariants: a weight is frozen under all its names, with everything that belongs to it (the scales of a weight in 4 bits). Two
models have the same digests if and only if their frozen weights have the same names, shapes, dtypes and bytes, however ZeRO
splits them. A persistent buffer is no weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from rlhf_ray.engine.weights import gathered_groups

Digests = Mapping[str, str]
"""SHA-256 of frozen weights as hexadecimal digits, by their names in memory."""


def frozen_names(module: nn.Module) -> set[str]:
    """The keys of ``module``'s state that hold a frozen weight or a part of one."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    # What is neither parameter nor buffer is what bitsandbytes adds to a weight in 4 bits, and those are frozen.
    added = nn.Module.state_dict(module).keys() - parameters.keys() - buffers
    return added | {name for name, parameter in parameters.items() if not parameter.requires_grad}


def frozen_digests(module: nn.Module) -> dict[str, str]:
    """The digests of the frozen weights of ``module``, a tied one under its first name. Collective under ZeRO-3.

    They are of the numbers that the model computes with: a weight in 4 bits counts dequantised.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if not frozen:
        return {}
    return {
        name: _digest(tensor)
        for group in gathered_groups(module, receive=True)
        for name, tensor in group
        if name in frozen
    }


def changed_weights(before: Digests, now: Digests) -> list[str]:
    """The names that one of both lacks, or under which they hold different weights."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
    digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
