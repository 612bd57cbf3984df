"""Rotary positions (RoPE) whose frequencies depend on the length of a sequence, such as longrope and dynamic NTK.

Invariant: the rotation of a token depends on its own sequence and on nothing else: not on longer sequences in the same pack
or batch, nor on what ran before.

transformers takes the longest sequence of a call for all of them, and keeps what it found for later calls. Here each length
is rotated by a copy of the module as it was loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_ray.config.files.positions import FIXED, longest_rotated_alike
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.trajectories.packing import Packed


def longest_alike(config: PreTrainedConfig) -> int | None:
    """Up to how many tokens all sequences are rotated alike; None if that is so at any length, 0 if at none."""
    return longest_rotated_alike(config.get_text_config().to_dict())


def share_alike(config: PreTrainedConfig, packed: Packed) -> Packed:
    """Return the pack, with nothing shared if its sequences may be rotated differently."""
    if packed.parent is None:
        return packed
    limit = longest_alike(config)
    return packed if limit is None or packed.longest_sequence <= limit else packed.unshared()


def rotate_by_sequence(model: PreTrainedModel) -> None:
    """Let the rotary modules of ``model`` rotate each sequence of a call by its own length.

    Calls are told apart by their positions alone: a sequence begins at position 0.
    """
    limit = longest_alike(model.config)
    if limit is None:
        return
    modules = [module for module in model.modules() if _varies(module)]
    if not modules:
        raise ModelLoadError(
            f"{type(model).__name__} rotates positions by the length of a sequence, in a way that is not known here: choose "
            "another model"
        )
    for module in modules:
        module.forward = _by_length(module, limit)


def _varies(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    return not FIXED.issuperset([] if kinds is None else kinds.values() if isinstance(kinds, Mapping) else [kinds])


def _by_length(module: nn.Module, limit: int) -> Any:
    """Make the forward that calls the one of a fresh copy of ``module`` for each length beyond ``limit``."""

    def forward(x: Tensor, position_ids: Int64[Tensor, "*axes batch length"], *rest: Any, **options: Any) -> Any:
        lengths = sequence_lengths(position_ids).clamp(min=limit)
        parts = []
        for length in lengths.unique().tolist():
            chosen = lengths == length
            rotated = type(module).forward(_fresh(module), x, position_ids[..., chosen][..., None, :], *rest, **options)
            parts.append((chosen, rotated))
        if isinstance(parts[0][1], tuple):
            return tuple(
                _join([(chosen, rotated[number]) for chosen, rotated in parts]) for number in range(len(parts[0][1]))
            )
        return _join(parts)

    return forward


def _join(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Put rotations (..., 1, tokens, width) back to where their tokens are in the batch."""
    chosen, first = parts[0]
    joined = first.new_empty(*first.shape[:-3], *chosen.shape, first.shape[-1])
    for chosen, rotated in parts:
        joined[..., chosen, :] = rotated.squeeze(-3)
    return joined


def _fresh(module: nn.Module) -> nn.Module:
    """Copy a module so that what its forward sets, buffers included, is set on the copy alone."""
    fresh = copy.copy(module)
    fresh._buffers = dict(module._buffers)
    return fresh


def sequence_lengths(position_ids: Int64[Tensor, "*axes batch length"]) -> Int64[Tensor, "batch length"]:
    """Return for each token how many tokens its sequence has.

    The axes of a text's positions (time, height, width) are equal. Padding before a sequence is one of its own, and padding
    behind it, whose positions are no larger than 1, belongs to it.
    """
    positions = position_ids.reshape(-1, *position_ids.shape[-2:])[0]
    rows, length = positions.shape
    number = (positions == 0).cumsum(1) + torch.arange(rows, device=positions.device)[:, None] * (length + 1)
    last = positions.new_zeros(rows * (length + 1)).scatter_reduce(0, number.flatten(), positions.flatten(), "amax")
    return last[number] + 1
