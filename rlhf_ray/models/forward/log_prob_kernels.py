"""Log-probs, entropies and their gradients from a chunk of logits, in one Triton kernel each way, for a GPU.

Plain torch passes four times over a chunk forward and three times backward, and more often for entropies. These kernels read
it once and, backward, write it once. The functions of the same names in ``log_probs.py`` are their reference: at first use the
kernels are tried against those, and where they fail or differ the log says so and plain torch goes on.

Invariants: sums are fp32. A row is one token. Its sums are built block by block, relative to the highest logit so far.

The kernels run in Triton's interpreter on the CPU, and are compiled for GPUs, in ``make test``. They have not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor
from triton import language as tl

BLOCK = 4096
"""Logits that a program of Triton holds at once."""
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _scaled(x: tl.tensor, temperature: tl.tensor, softcap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """Return ``cap(x) / temperature``, with tanh by a sigmoid, which Triton has on every device."""
    if CAPPED:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x / temperature


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _forward_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    log_probs_out: tl.tensor,
    normalisers: tl.tensor,
    entropies: tl.tensor,
    vocabulary: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    own = logits + row.to(tl.int64) * vocabulary
    highest, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z = _scaled(tl.load(own + column, mask=inside, other=0.0), temperature, softcap, CAPPED)
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        shift = tl.where(total > 0.0, highest - higher, 0.0)  # of what was summed relative to `highest`
        power = tl.exp(z - higher)
        if WITH_ENTROPY:
            below = tl.where(inside, z - higher, 0.0)  # not minus infinity times 0
            weighted = (weighted + total * shift) * tl.exp(shift) + tl.sum(power * below, 0)
        total = total * tl.exp(shift) + tl.sum(power, 0)
        highest = higher
    chosen = _scaled(tl.load(own + tl.load(targets + row)), temperature, softcap, CAPPED)
    rest = tl.log(total)
    tl.store(log_probs_out + row, chosen - highest - rest)
    tl.store(normalisers + row, highest + rest)
    if WITH_ENTROPY:
        tl.store(entropies + row, rest - weighted / total)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _backward_kernel(
    logits: tl.tensor,
    gradient: tl.tensor,
    targets: tl.tensor,
    normalisers: tl.tensor,
    for_log_probs: tl.tensor,
    entropies: tl.tensor,
    for_entropies: tl.tensor,
    vocabulary: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    OF_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    start = row.to(tl.int64) * vocabulary
    x = tl.load(logits + start + column, mask=inside, other=0.0)
    log_p = _scaled(x, temperature, softcap, CAPPED) - tl.load(normalisers + row)
    p = tl.exp(log_p)
    g = tl.load(for_log_probs + row)
    out = tl.where(column == tl.load(targets + row), g, 0.0) - g * p
    if OF_ENTROPY:
        out -= tl.load(for_entropies + row) * p * (log_p + tl.load(entropies + row))
    out = out / temperature
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
        out = out * (1.0 - bent * bent)
    tl.store(gradient + start + column, out, mask=inside)


def from_logits(
    logits: Float[Tensor, "chunk vocabulary"],
    targets: Int64[Tensor, "chunk"],
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do what :func:`rlhf_ray.models.forward.log_probs.from_logits` does, and leave the logits as they are."""
    logits = logits.contiguous()
    tokens, vocabulary = logits.shape
    log_p, normalisers = (torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropies = torch.empty_like(log_p) if with_entropy else None
    _forward_kernel[(tokens,)](
        logits, targets, log_p, normalisers, log_p if entropies is None else entropies, vocabulary, temperature,
        softcap or 1.0, CAPPED=softcap is not None, WITH_ENTROPY=with_entropy, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return log_p, normalisers, entropies


def logits_gradient(
    logits: Float[Tensor, "chunk vocabulary"],
    targets: Int64[Tensor, "chunk"],
    normalisers: Float[Tensor, "chunk"],
    for_log_probs: Float[Tensor, "chunk"],
    of_entropy: tuple[Float[Tensor, "chunk"], Float[Tensor, "chunk"]] | None,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Float[Tensor, "chunk vocabulary"]:
    """Do what :func:`rlhf_ray.models.forward.log_probs.logits_gradient` does; fp32 in the memory of the logits."""
    logits = logits.contiguous()
    tokens, vocabulary = logits.shape
    gradient = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    entropies, for_entropies = of_entropy or (normalisers, normalisers)
    _backward_kernel[(tokens, triton.cdiv(vocabulary, BLOCK))](
        logits, gradient, targets, normalisers, for_log_probs.contiguous(), entropies, for_entropies.contiguous(), vocabulary,
        temperature, softcap or 1.0, CAPPED=softcap is not None, OF_ENTROPY=of_entropy is not None, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return gradient
