"""Log-probabilities of tokens from hidden states on a CPU: in tiles of logits that stay in the cache of a core.

Invariants: log-probabilities and entropies are fp32 whatever the model's dtype, and so are logits, unless the head is told to
multiply in the model's dtype, which rounds each logit once more. At most one tile of logits exists at a time. All probabilities
are kept until the end of the backward pass, which they spare from computing the logits again, where they take at most
:data:`KEPT_BYTES` and no loss depends on entropies; else none are. Only the last bits of gradients depend on whether they are.
No input is changed.

For a head without bias and softcap, and tokens sampled from the whole vocabulary; ``log_probs.py`` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

TOKENS_AT_ONCE = 1024
"""Most rows of a tile."""
LOGITS_AT_ONCE = 1 << 18
"""Numbers in a tile of logits: with its operands they stay in the second cache of a core, or close to it."""
MOST_COLUMNS = 2048
"""Most columns of a tile: a tile of the weight is copied to fp32."""
KEPT_BYTES = 1 << 27
"""Most bytes of probabilities that a forward pass keeps for its backward, which otherwise computes all of them again."""


class _TiledLogProbs(torch.autograd.Function):
    """Compute ``log p(y) = z_y - log sum exp z`` and ``H = - sum p log p``, with ``z = h W^T / temperature``.

    A tile ``j`` gives its own softmax ``p_j`` and its own ``n_j = log sum exp z_j``; then ``n = log sum_j exp n_j`` and
    ``p = p_j exp(n_j - n)``. Backward, with ``g`` and ``g_H`` for the gradients of both:
    ``dz = g (1_y - p) - g_H p (log p + H)``. The column of the target has its own term, so that ``1 - p`` is not made of
    a ``p`` in half precision.
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
            for rows in _slices(len(targets), TOKENS_AT_ONCE):
                kept: list[Tensor] | None = [] if keep else None
                log_probs[rows], n, entropy, shares = _of_rows(
                    _factor(hidden[rows], fp32), weight, targets[rows], temperature, with_entropy, kept
                )
                normalisers[rows] = n
                if entropies is not None and entropy is not None:
                    entropies[rows] = entropy
                if kept is not None:
                    ctx.kept.append((kept, shares))
        ctx.save_for_backward(hidden, weight, targets, log_probs, normalisers, entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, for_log_probs: Tensor | None, for_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_probs, normalisers, entropies = ctx.saved_tensors
        g = torch.zeros_like(log_probs) if for_log_probs is None else for_log_probs / ctx.temperature
        g_entropy = None if for_entropies is None else for_entropies / ctx.temperature
        for_hidden = torch.empty_like(hidden)
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast("cpu", enabled=False):
            for number, rows in enumerate(_slices(len(targets), TOKENS_AT_ONCE)):
                factor, log_p = _factor(hidden[rows], ctx.fp32), log_probs[rows]
                at_target = g[rows] * -torch.expm1(log_p)
                if g_entropy is not None:
                    at_target -= g_entropy[rows] * log_p.exp() * (log_p + entropies[rows])
                    tiles = _entropy_tiles(
                        factor, weight, ctx.temperature, normalisers[rows], entropies[rows], g[rows], g_entropy[rows]
                    )
                elif ctx.kept:
                    kept, shares = ctx.kept[number]
                    tiles = _kept_tiles(kept, shares, g[rows])
                else:
                    tiles = _tiles_again(factor, weight, ctx.temperature, normalisers[rows], g[rows])
                wide = hidden[rows].float()
                for_hidden[rows] = _add_gradients(tiles, wide, weight, targets[rows], at_target, for_weight)
        ctx.kept = []  # they are no saved tensors, and would live as long as the loss
        return for_hidden, None if for_weight is None else for_weight.to(weight.dtype), *(None,) * 5


_apply: Callable[..., tuple[Tensor, Tensor | None]] = _TiledLogProbs.apply


def tiled_log_probs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, "tokens"],
    temperature: float,
    with_entropy: bool,
    entropy_in_loss: bool,
    fp32: bool = True,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"] | None]:
    """Return log-probabilities of the targets and, with ``with_entropy``, the entropies, both in nats.

    Without ``fp32`` logits are products in the dtype of the hidden states, which is twice as fast in bf16.
    ``entropy_in_loss`` says that a loss depends on the entropies: its gradient needs logits, so no probabilities are kept.
    """
    may_keep = torch.is_grad_enabled() and not entropy_in_loss
    return _apply(hidden, weight, targets, temperature, with_entropy, may_keep, fp32)


def _slices(length: int, most: int) -> Iterator[slice]:
    return (slice(start, min(start + most, length)) for start in range(0, length, most))


def _columns(rows: int, vocabulary: int) -> Iterator[slice]:
    return _slices(vocabulary, min(MOST_COLUMNS, max(1, LOGITS_AT_ONCE // max(rows, 1))))


def _factor(hidden: Float[Tensor, "rows hidden"], fp32: bool) -> Float[Tensor, "rows hidden"]:
    """Return the left side of the product that makes logits: its dtype is that of the product."""
    return hidden.float() if fp32 else hidden


def _logits(
    factor: Float[Tensor, "rows hidden"], weight: Float[Tensor, "columns hidden"], temperature: float
) -> Float[Tensor, "rows columns"]:
    logits = (factor @ weight.to(factor.dtype).t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _of_rows(
    factor: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, "rows"],
    temperature: float,
    with_entropy: bool,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return log-probs, normalisers, entropies (each ``rows``) and each tile's share of the probability (``rows tiles``).

    ``kept`` takes the softmax of every tile, with 0 at the targets.
    """
    chosen, peaks, totals, means = torch.empty(len(factor)), [], [], []
    for columns, rows, places in _with_targets(targets, len(weight)):
        z = _logits(factor, weight[columns], temperature)
        chosen[rows] = z[rows, places]
        highest, p = z.amax(-1), z.softmax(-1)
        peaks.append(highest)
        totals.append(p.amax(-1).log_().neg_())  # log sum exp of the tile, relative to its highest logit
        if with_entropy:
            means.append(z.sub_(highest[:, None]).mul_(p).sum(-1))
        if kept is not None:
            # Each in memory of its own: a large block would be asked of the system anew every time.
            kept.append(p.index_put_((rows, places), torch.zeros(())).to(weight.dtype))
    by_tile = torch.stack(peaks, 1)
    highest = by_tile.amax(1, keepdim=True)
    by_tile -= (
        highest  # from here on all is relative to the highest logit of the row: sums of large numbers would lose digits
    )
    sums = by_tile + torch.stack(totals, 1)
    rest = sums.logsumexp(1)
    shares = (sums - rest[:, None]).exp_()
    entropy = rest - (shares * by_tile.add_(torch.stack(means, 1))).sum(1) if with_entropy else None
    return chosen - highest[:, 0] - rest, highest[:, 0] + rest, entropy, shares


def _with_targets(targets: Int64[Tensor, "rows"], vocabulary: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the columns of each tile, the rows whose targets are in it, and the columns of these in the tile."""
    ordered, order = targets.sort(stable=True)
    for columns in _columns(len(targets), vocabulary):
        first, behind = torch.searchsorted(ordered, torch.tensor([columns.start, columns.stop])).tolist()
        yield columns, order[first:behind], ordered[first:behind] - columns.start


def _kept_tiles(
    kept: list[Tensor], shares: Float[Tensor, "rows tiles"], g: Float[Tensor, "rows"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each tile a matrix, and what its rows are to be multiplied with to make the gradient of the logits."""
    for tile, share in zip(kept, shares.unbind(1), strict=True):
        yield tile, -g * share


def _tiles_again(
    factor: Tensor, weight: Tensor, temperature: float, normalisers: Tensor, g: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same from logits that are computed again, with the targets' columns too."""
    for columns in _columns(len(factor), len(weight)):
        yield _logits(factor, weight[columns], temperature).sub_(normalisers[:, None]).exp_(), -g


def _entropy_tiles(
    factor: Tensor,
    weight: Tensor,
    temperature: float,
    normalisers: Tensor,
    entropies: Tensor,
    g: Tensor,
    g_entropy: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same where the loss depends on the entropies."""
    for columns in _columns(len(factor), len(weight)):
        log_p = _logits(factor, weight[columns], temperature).sub_(normalisers[:, None])
        p = log_p.exp()
        yield log_p.add_(entropies[:, None]).mul_(-g_entropy[:, None]).sub_(g[:, None]).mul_(p), torch.ones_like(g)


def _add_gradients(
    tiles: Iterator[tuple[Tensor, Tensor]],
    wide: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, "rows"],
    at_target: Float[Tensor, "rows"],
    for_weight: Float[Tensor, "vocabulary hidden"] | None,
) -> Float[Tensor, "rows hidden"]:
    """Return the gradient of some hidden states in fp32, and add that of the weight.

    ``at_target`` is the gradient of the targets' logits.
    """
    for_hidden = at_target[:, None] * weight.index_select(0, targets).float()
    for (columns, rows, places), (tile, factor) in zip(_with_targets(targets, len(weight)), tiles, strict=True):
        tile = tile.to(weight.dtype)
        tile[rows, places] = 0.0
        for_hidden.addcmul_((tile @ weight[columns]).float(), factor[:, None])
        if for_weight is not None:
            for_weight[columns] += tile.t() @ (wide * factor[:, None]).to(weight.dtype)
    if for_weight is not None:
        for_weight.index_add_(0, targets, wide * at_target[:, None])
    return for_hidden
