"""Log-probabilities of tokens from hidden states on a CPU: in blocks of logits, of which a core works on a few rows at a time.

Invariants: log-probabilities and entropies are fp32 whatever the model's dtype, and so are logits, unless the head is told to
multiply in the model's dtype, which rounds each logit once more. At most one block of logits exists at a time. All
probabilities are kept until the end of the backward pass, which they spare from computing the logits again, where they take at
most :data:`KEPT_BYTES` and no loss depends on entropies; else none are. Only the last bits of gradients depend on whether they
are. No input is changed.

For a head without bias and softcap, and tokens sampled from the whole vocabulary; ``log_probs.py`` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK_BYTES = (32 << 20) - (4 << 10)
"""Most bytes of logits in a block, unless ``FEWEST_ROWS`` take more: a larger one is asked of the system anew every time, since
it lies above the threshold of ``environment.MEMORY_KEPT``."""
FEWEST_ROWS = 128
"""Fewest tokens in a block, if there are so many: with fewer, reading the whole weight would take longer than the product."""
NUMBERS_AT_ONCE = 1 << 18
"""Logits on which softmax and entropy work at a time: with what is made of them they stay in the second cache of a core."""
COLUMNS_AT_ONCE = 2048
"""Tokens of the vocabulary whose weights are copied to fp32, or whose gradients are added to a sum in fp32, at a time."""
BLOCKS_IN_HALVES = 2
"""Most blocks whose gradients of the weight are added in its own half precision: each sum but the last is rounded once, as
each block's gradient would be."""
KEPT_BYTES = 1 << 27
"""Most bytes of probabilities that a forward pass keeps for its backward, which otherwise computes all of them again."""


class _LogProbsInBlocks(torch.autograd.Function):
    """Compute ``log p(y) = z_y - log sum exp z`` and ``H = - sum p log p``, with ``z = h W^T / temperature``.

    Backward, with ``g`` and ``g_H`` for the gradients of both: ``dz = g (1_y - p) - g_H p (log p + H)``. The column of the
    target has its own term, so that ``1 - p`` is not made of a ``p`` in half precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        may_keep: bool,
        fp32: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        log_probs, normalisers = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        entropies = torch.empty_like(log_probs) if with_entropy else None
        keep = may_keep and len(targets) * len(weight) * weight.element_size() <= KEPT_BYTES
        ctx.kept, ctx.temperature, ctx.fp32 = [], temperature, fp32
        with torch.autocast("cpu", enabled=False):
            for rows in _blocks(len(targets), weight, fp32):
                logits = _logits(hidden[rows], weight, fp32)
                kept = _room_for_probabilities(logits, weight) if keep else None
                log_probs[rows], normalisers[rows], entropy, shares = _of_block(
                    logits, targets[rows], temperature, with_entropy, kept
                )
                if entropies is not None and entropy is not None:
                    entropies[rows] = entropy
                if kept is not None:
                    ctx.kept.append((kept, shares))
                del logits  # before the next block is made
        ctx.save_for_backward(hidden, weight, targets, log_probs, normalisers, entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, for_log_probs: Tensor | None, for_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_probs, normalisers, entropies = ctx.saved_tensors
        g = torch.zeros_like(log_probs) if for_log_probs is None else for_log_probs / ctx.temperature
        g_entropy = None if for_entropies is None else for_entropies / ctx.temperature
        for_hidden, blocks = torch.empty_like(hidden), list(_blocks(len(targets), weight, ctx.fp32))
        for_weight = _WeightGradient(weight, len(blocks)) if ctx.needs_input_grad[1] else None
        with torch.autocast("cpu", enabled=False):
            for number, rows in enumerate(blocks):
                log_p, factor = log_probs[rows], -g[rows]
                at_target = g[rows] * -torch.expm1(log_p)
                if g_entropy is not None:
                    at_target -= g_entropy[rows] * log_p.exp() * (log_p + entropies[rows])
                    of_entropy = entropies[rows], g_entropy[rows], g[rows]
                    matrix = _from_logits_again(
                        _logits(hidden[rows], weight, ctx.fp32), weight, ctx.temperature, normalisers[rows], of_entropy
                    )
                    factor = torch.ones_like(log_p)
                elif ctx.kept:
                    matrix, shares = ctx.kept[number]
                    factor = factor * shares
                else:
                    matrix = _from_logits_again(
                        _logits(hidden[rows], weight, ctx.fp32), weight, ctx.temperature, normalisers[rows]
                    )
                for_hidden[rows] = _add_gradients(
                    matrix, factor, hidden[rows].float(), weight, targets[rows], at_target, for_weight
                )
                del matrix  # before the next block is made
        ctx.kept = []  # they are no saved tensors, and would live as long as the loss
        return for_hidden, None if for_weight is None else for_weight.whole(targets), *(None,) * 5


_apply: Callable[..., tuple[Tensor, Tensor | None]] = _LogProbsInBlocks.apply


def log_probs_in_blocks(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, "tokens"],
    temperature: float,
    with_entropy: bool,
    entropy_in_loss: bool,
    fp32: bool = True,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"] | None]:
    """Return log-probabilities of the targets and, with ``with_entropy``, the entropies, both in nats.

    Without ``fp32`` logits are products in the dtype of the hidden states, which is faster in bf16.
    ``entropy_in_loss`` says that a loss depends on the entropies: its gradient needs logits, so no probabilities are kept.
    """
    may_keep = torch.is_grad_enabled() and not entropy_in_loss
    return _apply(hidden, weight, targets, temperature, with_entropy, may_keep, fp32)


def _slices(length: int, most: int) -> Iterator[slice]:
    return (slice(start, min(start + most, length)) for start in range(0, length, most))


def _blocks(tokens: int, weight: Float[Tensor, "vocabulary hidden"], fp32: bool) -> Iterator[slice]:
    """Cut the tokens into blocks that are as equal as can be."""
    row = len(weight) * (4 if fp32 else weight.element_size())
    blocks = -(-tokens // max(FEWEST_ROWS, BLOCK_BYTES // row))
    return _slices(tokens, -(-tokens // max(blocks, 1)) or 1)


def _a_few_rows(logits: Float[Tensor, "rows vocabulary"]) -> Iterator[slice]:
    return _slices(len(logits), max(1, NUMBERS_AT_ONCE // logits.shape[1]))


def _logits(
    hidden: Float[Tensor, "rows hidden"], weight: Float[Tensor, "vocabulary hidden"], fp32: bool
) -> Float[Tensor, "rows vocabulary"]:
    """Return the product of both, in fp32 or in the dtype of the hidden states."""
    factor = hidden.float() if fp32 else hidden
    if weight.dtype == factor.dtype:
        return factor @ weight.t()
    logits = factor.new_empty(len(factor), len(weight))
    for columns in _slices(len(weight), COLUMNS_AT_ONCE):
        torch.mm(factor, weight[columns].to(factor.dtype).t(), out=logits[:, columns])
    return logits


def _room_for_probabilities(logits: Tensor, weight: Tensor) -> Tensor:
    """Return a matrix in the dtype of the weight: the logits' own, which are used up, if that is theirs."""
    return logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)


def _of_block(
    logits: Float[Tensor, "rows vocabulary"],
    targets: Int64[Tensor, "rows"],
    temperature: float,
    with_entropy: bool,
    kept: Float[Tensor, "rows vocabulary"] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return log-probs, normalisers ``log sum exp z``, entropies and shares (each ``rows``), and use up the logits.

    ``kept``, which may be the logits themselves, takes ``exp(z - max z)``: the probabilities over the shares.
    """
    chosen = _scaled(logits[torch.arange(len(targets)), targets], temperature)
    highest, total, mean = (torch.empty(len(logits), 1) for _ in range(3))
    for rows in _a_few_rows(logits):
        z = _scaled(logits[rows], temperature)
        torch.amax(z, -1, keepdim=True, out=highest[rows])
        z.sub_(highest[rows])
        powers = z.exp() if with_entropy else z.exp_()
        torch.sum(powers, -1, keepdim=True, out=total[rows])
        if with_entropy:
            torch.sum(z.mul_(powers), -1, keepdim=True, out=mean[rows])
        if kept is not None:
            kept[rows] = powers
    highest, total = highest[:, 0], total[:, 0]
    rest = total.log()
    entropies = rest - mean[:, 0] / total if with_entropy else None
    return chosen - highest - rest, highest + rest, entropies, total.reciprocal()


def _without_targets(matrix: Float[Tensor, "rows vocabulary"], targets: Int64[Tensor, "rows"]) -> None:
    """Set the targets to 0, in place; ``scatter_`` would copy the whole matrix."""
    matrix[torch.arange(len(targets)), targets] = 0.0


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits over the temperature in fp32: in their own memory if they are fp32, else in a copy."""
    z = logits.float()
    return z if temperature == 1.0 else z.div_(temperature)


def _from_logits_again(
    logits: Float[Tensor, "rows vocabulary"],
    weight: Float[Tensor, "vocabulary hidden"],
    temperature: float,
    normalisers: Float[Tensor, "rows"],
    of_entropy: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "rows vocabulary"]:
    """Return the probabilities in the dtype of the weight, and use up the logits.

    With ``of_entropy`` (entropies, their gradients, and those of the log-probs) return the gradient of the logits instead.
    """
    matrix = _room_for_probabilities(logits, weight)
    for rows in _a_few_rows(logits):
        log_p = _scaled(logits[rows], temperature).sub_(normalisers[rows, None])
        if of_entropy is None:
            matrix[rows] = log_p.exp_()
        else:
            entropies, g_entropy, g = (numbers[rows, None] for numbers in of_entropy)
            p = log_p.exp()
            matrix[rows] = log_p.add_(entropies).mul_(-g_entropy).sub_(g).mul_(p)
    return matrix


class _WeightGradient:
    """Adds up the gradient of a weight over blocks of tokens."""

    def __init__(self, weight: Float[Tensor, "vocabulary hidden"], blocks: int) -> None:
        self._dtype, self._at_targets = weight.dtype, list[Tensor]()
        in_place = weight.dtype == torch.float32 or 0 < blocks <= BLOCKS_IN_HALVES
        self._sum = torch.empty_like(weight) if in_place else torch.zeros_like(weight, dtype=torch.float32)
        self._in_place, self._empty = in_place, in_place

    def add(
        self,
        matrix: Float[Tensor, "rows vocabulary"],
        factor: Float[Tensor, "rows"],
        wide: Float[Tensor, "rows hidden"],
        at_target: Float[Tensor, "rows"],
    ) -> None:
        """Add what a block gives, as in :func:`_add_gradients`."""
        scaled = (wide * factor[:, None]).to(self._dtype)
        if self._empty:
            torch.mm(matrix.t(), scaled, out=self._sum)
        elif self._in_place:
            self._sum.addmm_(matrix.t(), scaled)
        else:
            for columns in _slices(len(self._sum), COLUMNS_AT_ONCE):
                self._sum[columns] += matrix[:, columns].t() @ scaled
        self._empty = False
        self._at_targets.append(wide * at_target[:, None])

    def whole(self, targets: Int64[Tensor, "tokens"]) -> Float[Tensor, "vocabulary hidden"]:
        """Return the sum, to which the targets' own terms come: those of the same token are added in fp32 first."""
        if self._at_targets:
            tokens, place = targets.unique(return_inverse=True)
            rows = self._sum.index_select(0, tokens).float().index_add_(0, place, torch.cat(self._at_targets))
            self._sum.index_copy_(0, tokens, rows.to(self._sum.dtype))
        return self._sum.zero_() if self._empty else self._sum.to(self._dtype)


def _add_gradients(
    matrix: Float[Tensor, "rows vocabulary"],
    factor: Float[Tensor, "rows"],
    wide: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, "rows"],
    at_target: Float[Tensor, "rows"],
    for_weight: _WeightGradient | None,
) -> Float[Tensor, "rows hidden"]:
    """Return the gradient of some hidden states in fp32, and add that of the weight.

    The rows of ``matrix`` times ``factor`` are the gradient of the logits, but for the targets': that is ``at_target``.
    """
    _without_targets(matrix, targets)
    for_hidden = at_target[:, None] * weight.index_select(0, targets).float()
    for_hidden.addcmul_((matrix @ weight).float(), factor[:, None])
    if for_weight is not None:
        for_weight.add(matrix, factor, wide, at_target)
    return for_hidden
