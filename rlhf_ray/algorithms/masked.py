"""Sums, means and whitening over the tokens that count.

Always true: a token outside the mask has no influence on a value or on a gradient, even where NaN or Inf stands there.
It is replaced before any arithmetic: multiplying by a mask of zeros would keep NaN. At a token that counts, NaN and Inf
stay, so that the caller sees them. Ragged tensors are flat: ``offsets`` (B+1) cuts N tokens into B sequences.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor


def keep(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], fill: float = 0.0) -> Float[Tensor, "N"]:
    """``x`` where the mask is set and ``fill`` elsewhere, in float32 or wider, cut from the gradient there."""
    expect_shape("mask", mask, x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, wide, torch.full_like(wide, fill))


def masked_sum(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """The sum over the tokens that count; 0 where none does."""
    return keep(x, mask).sum()


def masked_mean(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """The mean over the tokens that count; 0 where none does."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(
    x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], *, unbiased: bool = False, shift_mean: bool = True
) -> Float[Tensor, "N"]:
    """``(x - mean) / sqrt(var + 1e-8)`` over the tokens that count, and 0 elsewhere.

    ``unbiased`` divides the variance by n-1 (as TRL) instead of n (as Ziegler et al. 2019, OpenRLHF). Without
    ``shift_mean`` the mean is added back, so that only the scale changes (rewards).
    """
    kept = keep(x, mask).double()
    count = mask.sum()
    mean = kept.sum() / count.clamp(min=1)
    centred = torch.where(mask, kept - mean, torch.zeros_like(kept))
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    scaled = centred * torch.rsqrt(variance + 1e-8)
    whitened = scaled if shift_mean else keep(scaled + mean, mask)
    return whitened.to(torch.promote_types(x.dtype, torch.float32))


def segment_sum(values: Num[Tensor, "N"], offsets: Int64[Tensor, "cuts"]) -> Num[Tensor, "cuts-1"]:
    """The sum of each sequence's tokens; a NaN stays in its own sequence. Mask with :func:`keep` first."""
    return values.new_zeros(len(offsets) - 1).index_add(0, sequence_of_token(offsets), values)


def sequence_of_token(offsets: Int64[Tensor, "cuts"]) -> Int64[Tensor, "N"]:
    """The row of the sequence to which each token belongs."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff())


def count_actions(action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]) -> Int64[Tensor, "cuts-1"]:
    """How many tokens of each sequence count."""
    return segment_sum(action_mask.long(), offsets)


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """Refuse a tensor that broadcasting would silently stretch."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {tuple(shape)} is needed")
