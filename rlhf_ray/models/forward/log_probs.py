"""Log-probabilities of tokens from hidden states, in chunks, so that the logits of a whole batch never exist.

Invariants: log-probabilities and entropies are fp32 whatever the model's dtype, and so are logits, unless the head is told to
multiply in the model's dtype, which rounds each logit once more. At most one chunk of logits exists at a time, also in the
backward pass, which computes it again; an entropy takes the memory of a second one. What nobody asks for (an entropy, its
gradient, a temperature of 1) costs no pass over a chunk. No input is changed.

A plain head on a CPU has chunks of its own instead, and works on a few rows of them at a time (``log_prob_blocks.py``).

The head is the model's own output layer: one module that owns the weight and the loop over chunks. So ZeRO-3 gathers the
weight once per call, however many chunks a rank has, and ranks with different numbers of tokens do not wait for each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from rlhf_ray.console import get_logger
from rlhf_ray.models.forward.log_prob_blocks import log_probs_in_blocks
from rlhf_ray.trajectories.kept_sets import KeptSets

LOGITS_AT_ONCE = 1 << 20
"""Numbers in a chunk of logits: few enough to stay in the cache of a CPU core."""
FEWEST_TOKENS_AT_ONCE = 128
"""Smallest chunk, in tokens: with fewer, reading the whole weight would take longer than the product."""
FACTOR_ON_GPU = 8
"""How much larger a chunk is on a GPU, which needs more work at once and has the memory for it."""
OUTSIDE = -1e20
"""The logit of a token outside the set that was kept: its probability is exactly 0, and no product with it is NaN."""
AGREEMENT = 1e-5
"""Largest difference from plain torch, as a share of the largest number, with which Triton's kernels are used."""


def chunk_size(vocabulary: int, *, on_gpu: bool = False) -> int:
    """Return the number of tokens whose logits are held at once."""
    return max(FEWEST_TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary) * (FACTOR_ON_GPU if on_gpu else 1)


class LogProbHead(nn.Linear):
    """The output layer of a language model, which also gives log-probabilities in chunks.

    ``softcap`` bounds the logits as Gemma 2 does: ``softcap * tanh(logits / softcap)``. Without ``fp32`` logits are rounded to
    the model's dtype, as its own output layer and vLLM's do: at |z| = 8 to 0.03 in bf16.
    """

    softcap: float | None
    fp32: bool = True

    @classmethod
    def around(cls, layer: nn.Linear, softcap: float | None) -> LogProbHead:
        """Make a head out of an output layer. The parameters stay the same objects, so tied weights stay tied."""
        head = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        head.weight, head.bias = layer.weight, layer.bias
        head.softcap = softcap
        return head.train(layer.training)

    def forward(
        self,
        hidden: Float[Tensor, "*tokens hidden"],
        targets: Int64[Tensor, "tokens"] | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        kept: KeptSets | None = None,
        entropy_in_loss: bool = False,
        read: Callable[[LogProbHead, Tensor], Any] | None = None,
    ) -> Any:
        """Return the logits; or with ``targets`` a pair: their log-probabilities (tokens,) and the entropies (tokens,) in nats.

        Logits are divided by ``temperature`` first. With ``kept`` both are of the distribution over the set of each token,
        which must hold the target. Without ``with_entropy`` the second of the pair is None. ``entropy_in_loss`` says that the
        entropies will be differentiated; gradients are right without it too, but cost more memory. With ``read`` return what
        that makes of this layer and ``hidden``: inside of the call, where ZeRO-3 has gathered the weight.
        """
        if read is not None:
            return read(self, hidden)
        if targets is None:
            return functional.linear(hidden, self.weight, self.bias)
        if blocks_suit(hidden, self.bias, self.softcap, kept):
            return log_probs_in_blocks(
                hidden, self.weight, targets, temperature, with_entropy, entropy_in_loss, self.fp32
            )
        return _chunked_log_probs(
            hidden, self.weight, self.bias, targets, temperature, self.softcap, with_entropy, kept, self.fp32
        )

    def capped(self, logits: Float[Tensor, "*tokens vocabulary"]) -> Float[Tensor, "*tokens vocabulary"]:
        """Bound logits by the softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def blocks_suit(hidden: Tensor, bias: Tensor | None, softcap: float | None, kept: KeptSets | None) -> bool:
    """Return whether a core works on a few rows of logits at a time (``log_prob_blocks.py``): on a CPU, for a plain head."""
    return hidden.device.type == "cpu" and bias is None and softcap is None and kept is None


class _ChunkedLogProbs(torch.autograd.Function):
    """Compute ``log p(y) = z_y - log sum exp z`` and ``H = - sum p log p``, with ``z = cap(h W^T + b) / temperature``.

    The sums run over the kept set of each token, or the vocabulary.

    Backward, with ``g`` and ``g_H`` for the gradients of both: ``dz = g (1_y - p) - g_H p (log p + H)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
        kept: KeptSets | None,
        fp32: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        log_probs, normalisers = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        entropies = torch.empty_like(log_probs) if with_entropy else None
        wide, compute = _widen(weight, hidden, fp32), _functions(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight.shape[0], hidden.is_cuda):
                logits, cap = _logits(hidden[part], wide, bias, fp32), softcap
                if kept is not None:
                    logits, cap = _cut(_cap_in_place(logits, softcap), kept, part), None
                log_probs[part], normalisers[part], entropy = compute.from_logits(
                    logits, targets[part], temperature, cap, with_entropy
                )
                del logits  # before the next chunk is made
                if entropies is not None and entropy is not None:
                    entropies[part] = entropy
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies)
        ctx.temperature, ctx.softcap, ctx.kept, ctx.fp32 = temperature, softcap, kept, fp32
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, for_log_probs: Tensor | None, for_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropies = ctx.saved_tensors
        if for_log_probs is None:
            for_log_probs = torch.zeros_like(normalisers)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        wide, compute = _widen(weight, hidden, ctx.fp32), _functions(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight.shape[0], hidden.is_cuda):
                of_entropy = None if for_entropies is None else (entropies[part], for_entropies[part])
                logits, cap, slope = _logits(hidden[part], wide, bias, ctx.fp32), ctx.softcap, None
                if ctx.kept is not None:
                    capped = _cap_in_place(logits, ctx.softcap)
                    slope = None if cap is None else (capped / cap).square_().neg_().add_(1.0)
                    logits, cap = _cut(capped, ctx.kept, part), None
                    del capped
                gradient = compute.logits_gradient(
                    logits,
                    targets[part],
                    normalisers[part],
                    for_log_probs[part],
                    of_entropy,
                    ctx.temperature,
                    cap,
                    weight.dtype if for_bias is None and slope is None else torch.float32,
                )
                if slope is not None:
                    gradient.mul_(slope)
                if for_bias is not None:
                    for_bias += gradient.sum(0)
                gradient = gradient.to(weight.dtype)
                if for_hidden is not None:
                    for_hidden[part] = gradient @ weight
                if for_weight is not None:
                    _add_product(for_weight, gradient.t(), hidden[part].to(weight.dtype))
                del gradient, logits, slope  # before the next chunk of logits is made
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if bias is None or for_bias is None else for_bias.to(bias.dtype),
            *(None,) * 6,
        )


_chunked_log_probs: Callable[..., tuple[Tensor, Tensor | None]] = _ChunkedLogProbs.apply


def from_logits(
    logits: Float[Tensor, "chunk vocabulary"],
    targets: Int64[Tensor, "chunk"],
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log-probabilities, normalisers ``log sum exp z`` and entropies (chunk,), and use up the memory of the logits."""
    z = _cap_in_place(logits, softcap)
    if temperature != 1.0:
        z.div_(temperature)
    highest = z.amax(-1, keepdim=True)
    z.sub_(highest)
    chosen = z.gather(1, targets[:, None])[:, 0]
    powers = z.exp() if with_entropy else z.exp_()
    total = powers.sum(-1)
    rest = total.log()
    entropy = rest - powers.mul_(z).sum(-1) / total if with_entropy else None
    return chosen - rest, highest[:, 0] + rest, entropy


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
    """Return the gradient of a chunk's logits before the softcap, in ``dtype``, and use up the memory of the logits.

    ``of_entropy`` holds the entropies and their gradients, or is None where no loss depends on them.
    """
    z = _cap_in_place(logits, softcap)
    slope = None if softcap is None else (z / softcap).square_().neg_().add_(1.0)
    if temperature != 1.0:
        z.div_(temperature)
    g = (for_log_probs / temperature)[:, None]
    log_p = z.sub_(normalisers[:, None])
    if of_entropy is None:
        gradient = log_p.exp_().mul_(-g)
    else:
        entropy, for_entropy = of_entropy
        factor = (-for_entropy / temperature)[:, None]
        p = log_p.exp()
        gradient = torch.addcmul(factor * entropy[:, None] - g, log_p, factor, out=log_p).mul_(p)
    gradient.scatter_add_(1, targets[:, None], g)
    return (gradient if slope is None else gradient.mul_(slope)).to(dtype)


def _cut(logits: Float[Tensor, "chunk vocabulary"], kept: KeptSets, part: slice) -> Float[Tensor, "chunk vocabulary"]:
    """Leave every token of a chunk its kept set alone, in place."""
    return logits.masked_fill_(kept.select(part).mask(logits.shape[1]).logical_not_(), OUTSIDE)


def _functions(device: torch.device) -> ModuleType:
    """Choose where ``from_logits`` and ``logits_gradient`` come from: Triton's kernels on a GPU where they work, or here."""
    if device.type == "cuda" and find_spec("triton") is not None:
        try:
            from rlhf_ray.models.forward import log_prob_kernels
        except Exception as error:  # a Triton that does not fit this driver or compiler
            _say_why_not(device, f"{type(error).__name__}: {error}")
        else:
            if kernels_work(log_prob_kernels, device):
                return log_prob_kernels
    return sys.modules[__name__]


@cache
def kernels_work(kernels: ModuleType, device: torch.device) -> bool:
    """Try the kernels against plain torch on a device, once in a process; say in the log why they are not used."""
    try:
        off = max(kernel_differences(kernels, device))
        reason = None if off <= AGREEMENT else f"they differ from plain torch by {off:.1e}"
    except Exception as error:  # whatever a compiler or a driver raises: the plain functions do the same work
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        _say_why_not(device, reason)
    return reason is None


@cache
def _say_why_not(device: torch.device, reason: str) -> None:
    get_logger(__name__).warning("log-probs are computed without Triton's kernels on %s: %s", device, reason)


def kernel_differences(kernels: ModuleType, device: torch.device) -> list[float]:
    """Compare log-probs, normalisers, entropies and gradients of a few tokens, over more than a block of logits."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(5, kernels.BLOCK + 100, generator=generator).to(device).mul_(3.0)
    targets = torch.tensor([0, 1, kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 99], device=device)
    weights = torch.randn(2, len(targets), generator=generator).to(device)
    pairs = []
    for softcap in (None, 2.0):
        theirs = from_logits(made.clone(), targets, 0.7, softcap, True)
        pairs += list(zip(kernels.from_logits(made.clone(), targets, 0.7, softcap, True), theirs, strict=True))
        _, normalisers, entropies = theirs
        assert entropies is not None
        for of_entropy in (None, (entropies, weights[1])):
            rest = targets, normalisers, weights[0], of_entropy, 0.7, softcap, torch.float32
            pairs.append((kernels.logits_gradient(made.clone(), *rest), logits_gradient(made.clone(), *rest)))
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a is not None and b is not None]


def _logits(
    hidden: Float[Tensor, "chunk hidden"], weight: Float[Tensor, "vocabulary hidden"], bias: Tensor | None, fp32: bool
) -> Float[Tensor, "chunk vocabulary"]:
    if not fp32:
        return functional.linear(hidden, weight, bias).float()
    if _sums_wider(hidden, weight):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    return functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def _add_product(total: Float[Tensor, "rows columns"], left: Tensor, right: Tensor) -> None:
    """Add the matrix product of ``left`` and ``right`` to ``total``, in place and in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _sums_wider(left, right):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # no product of its own: reads `total` once
    else:
        total += left @ right


def _sums_wider(left: Tensor, right: Tensor) -> bool:
    """Return whether a product of these is summed in fp32 although they are not: on a GPU, in half precision."""
    return left.is_cuda and left.dtype == right.dtype != torch.float32


def _chunks(tokens: int, vocabulary: int, on_gpu: bool) -> list[slice]:
    size = chunk_size(vocabulary, on_gpu=on_gpu)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _widen(weight: Tensor, hidden: Tensor, fp32: bool) -> Tensor:
    """Return the weight in fp32, once for all chunks, unless a product in half precision is wanted or summed in fp32."""
    return weight if not fp32 or _sums_wider(hidden, weight) else weight.float()


def _cap_in_place(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
