"""Sums, means and whitening over the tokens that a mask selects.

Invariants:

- A token outside the mask has no influence on a value or a gradient, even where NaN or Inf stands there. It is replaced
  before any arithmetic, because multiplying by a mask of zeros would keep NaN.
- At a token inside the mask NaN and Inf stay, so that the caller sees them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor


def keep(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], fill: float = 0.0) -> Float[Tensor, "N"]:
    """Return ``x`` where the mask is set and ``fill`` elsewhere, in float32 or wider; no gradient flows elsewhere.

    Raises ``ValueError`` where the shapes differ.
    """
    expect_shape("mask", mask, x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, wide, torch.full_like(wide, fill))


def masked_sum(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """Sum over the tokens in the mask; 0 where there is none."""
    return keep(x, mask).sum()


def masked_mean(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """Average over the tokens in the mask; 0 where there is none."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(
    x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], *, unbiased: bool = False, shift_mean: bool = True
) -> Float[Tensor, "N"]:
    """Return ``(x - mean) / sqrt(var + 1e-8)`` over the tokens in the mask, and 0 elsewhere.

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
    """Sum the tokens of each sequence; a NaN stays in its own sequence. Mask with :func:`keep` first."""
    return values.new_zeros(len(offsets) - 1).index_add(0, sequence_of_token(offsets, len(values)), values)


def sequence_of_token(offsets: Int64[Tensor, "cuts"], tokens: int | None = None) -> Int64[Tensor, "N"]:
    """Return the row of the sequence that each token belongs to. A GPU is asked how many ``tokens`` there are if it is None."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=tokens)


def count_actions(action_mask: Bool[Tensor, "N"], offsets: Int64[Tensor, "cuts"]) -> Int64[Tensor, "cuts-1"]:
    """Count the actions of each sequence."""
    return segment_sum(action_mask.long(), offsets)


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """Raise ``ValueError`` for a tensor of another shape, which broadcasting might stretch without a word."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {tuple(shape)} is needed")
