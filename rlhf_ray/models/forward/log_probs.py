"""Log-probabilities of tokens from hidden states, in chunks, so that the logits of a whole batch never exist.

Invariants: logits, log-probabilities and entropies are fp32 whatever the model's dtype. At most one chunk of logits exists at
a time, also in the backward pass, which computes it again. No input is changed.

The head is the model's own output layer: one module that owns the weight and the loop over chunks. So ZeRO-3 gathers the
weight once per call, however many chunks a rank has, and ranks with different numbers of tokens do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

LOGITS_AT_ONCE = 1 << 20
"""Numbers in a chunk of logits: few enough to stay in the cache of a CPU core."""
FEWEST_TOKENS_AT_ONCE = 128
"""Smallest chunk, in tokens: with fewer, reading the whole weight would take longer than the product."""
FACTOR_ON_GPU = 8
"""How much larger a chunk is on a GPU, which needs more work at once and has the memory for it."""


def chunk_size(vocabulary: int, *, on_gpu: bool = False) -> int:
    """Return the number of tokens whose logits are held at once."""
    return max(FEWEST_TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary) * (FACTOR_ON_GPU if on_gpu else 1)


class LogProbHead(nn.Linear):
    """The output layer of a language model, which also gives log-probabilities in chunks.

    ``softcap`` bounds the logits as Gemma 2 does: ``softcap * tanh(logits / softcap)``.
    """

    softcap: float | None

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
    ) -> Any:
        """Return the logits; or with ``targets`` a pair: their log-probabilities (tokens,) and the entropies (tokens,) in nats.

        Logits are divided by ``temperature`` first. Without ``with_entropy`` the second of the pair is None.
        """
        if targets is None:
            return functional.linear(hidden, self.weight, self.bias)
        log_probs, entropy = _chunked_log_probs(
            hidden, self.weight, self.bias, targets, temperature, self.softcap, with_entropy
        )
        return log_probs, entropy if with_entropy else None

    def capped(self, logits: Float[Tensor, "*tokens vocabulary"]) -> Float[Tensor, "*tokens vocabulary"]:
        """Bound logits by the softcap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _logits(
    hidden: Float[Tensor, "chunk hidden"], weight: Float[Tensor, "vocabulary hidden"], bias: Tensor | None
) -> Float[Tensor, "chunk vocabulary"]:
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    return functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


class _ChunkedLogProbs(torch.autograd.Function):
    """Compute ``log p(y) = z_y - log sum exp z`` and ``H = - sum p log p``, with ``z = cap(h W^T + b) / temperature``.

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
    ) -> tuple[Tensor, Tensor]:
        log_probs, normalisers, entropies = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
        wide = _widen(weight, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight.shape[0], hidden.is_cuda):
                logits = _cap_in_place(_logits(hidden[part], wide, bias), softcap).div_(temperature)
                normalisers[part] = normaliser = logits.logsumexp(-1)
                log_probs[part] = logits.gather(1, targets[part, None])[:, 0] - normaliser
                if with_entropy:
                    log_p = logits.sub_(normaliser[:, None])
                    entropies[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies)
        ctx.temperature, ctx.softcap, ctx.with_entropy = temperature, softcap, with_entropy
        return log_probs, entropies if with_entropy else entropies[:0]

    @staticmethod
    def backward(ctx: Any, log_prob_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *_ = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        wide = _widen(weight, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight.shape[0], hidden.is_cuda):
                gradient = _logits_gradient(
                    ctx, part, _logits(hidden[part], wide, bias), log_prob_gradient, entropy_gradient
                )
                if for_bias is not None:
                    for_bias += gradient.sum(0)
                narrow = gradient.to(weight.dtype)
                del gradient
                if for_hidden is not None:
                    for_hidden[part] = narrow @ weight
                if for_weight is not None and weight.dtype == torch.float32:
                    for_weight.addmm_(narrow.t(), hidden[part].float())
                elif for_weight is not None:
                    for_weight += narrow.t() @ hidden[part].to(weight.dtype)
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if bias is None or for_bias is None else for_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


_chunked_log_probs: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLogProbs.apply


def _logits_gradient(
    ctx: Any, part: slice, logits: Float[Tensor, "chunk vocabulary"], for_log_probs: Tensor, for_entropy: Tensor
) -> Float[Tensor, "chunk vocabulary"]:
    """Return the gradient of a chunk's logits before the softcap, in the memory of the logits if nothing else needs them."""
    _, _, _, targets, normalisers, entropies = ctx.saved_tensors
    capped = _cap_in_place(logits, ctx.softcap)
    slope = None if ctx.softcap is None else (capped / ctx.softcap).square_().neg_().add_(1.0)
    log_p = capped.div_(ctx.temperature).sub_(normalisers[part, None])
    p = log_p.exp() if ctx.with_entropy else log_p.exp_()
    surprise = log_p.add_(entropies[part, None]).mul_(p).mul_(for_entropy[part, None]) if ctx.with_entropy else None
    gradient = p.mul_(-for_log_probs[part, None])
    gradient.scatter_add_(1, targets[part, None], for_log_probs[part, None])
    if surprise is not None:
        gradient.sub_(surprise)
    gradient.div_(ctx.temperature)
    return gradient if slope is None else gradient.mul_(slope)


def _chunks(tokens: int, vocabulary: int, on_gpu: bool) -> list[slice]:
    size = chunk_size(vocabulary, on_gpu=on_gpu)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _widen(weight: Tensor, hidden: Tensor) -> Tensor:
    """Return the weight in fp32, once for all chunks, unless a GPU multiplies in half precision and sums in fp32."""
    return weight if hidden.is_cuda and hidden.dtype != torch.float32 else weight.float()


def _cap_in_place(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
