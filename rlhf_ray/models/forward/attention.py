"""Causal attention over a pack, in plain torch, on any device.

A pack is cut into segments. A segment may continue an earlier one, as an answer continues its prompt.

Invariants: a token attends to itself, to earlier tokens of its own segment, and to the segments that its segment continues,
within the sliding window if there is one, and to nothing else. Padding inside a batch of segments influences neither
results nor gradients.

Segments of similar length run as one batch, so that the cost grows with the lengths of the segments and not with the square
of the pack. On CPU, in half precision, explicit matrix products around a softmax in fp32 take half the time of torch's flash
kernel, backward included, up to a few hundred tokens. Longer segments go to the kernel, which keeps no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rlhf_ray.models.forward.segments import COLUMNS, Group, Segments
from rlhf_ray.trajectories.batch import send

LONGEST_KEPT = 512
"""Most keys per query for which explicit products are used in training, where all probabilities are kept."""
LONGEST_EXPLICIT = 2048
"""Most keys per query for which they are used without gradients. Beyond, the mask takes as much memory as they save."""
LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Dtypes in which products on CPU are faster than in fp32, while torch's kernel is not."""
SCORES_AT_ONCE = 1 << 19
"""Most scores in one explicit product: they should stay in the cache from the first product to the second."""
QUERIES_AT_ONCE = 96
"""Most queries in one explicit product. Fewer leave out more of the keys that lie behind the last query."""
FEW_SHARERS = 4
"""Most gradients of a shared token that are added in their own precision; more are added in fp32."""


def segment_attention(
    query: Float[Tensor, "heads tokens dim"],
    key: Float[Tensor, "key_heads tokens dim"],
    value: Float[Tensor, "key_heads tokens value_dim"],
    segments: Segments,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "heads tokens value_dim"]:
    """Attend within each segment: ``softmax(scaling * q k^T + mask) v``, with scores bounded by ``softcap``.

    There may be fewer key heads than heads: then consecutive heads share one. If ``segments.read`` names tokens, only their
    results are computed and all others are zero.
    """
    repeats = query.shape[0] // key.shape[0]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    keys, values = (_to_rows(tensor, segments, True) for tensor in (key, value))
    if segments.read is not None:
        return _read_attention(query, keys, values, segments, segments.read, scaling, window, softcap)
    queries = _to_rows(query, segments, False)
    outputs = []
    for group, q, k, v in zip(segments.groups, queries, keys, values, strict=True):
        reach = window if window is not None and window < group.context + group.longest else None
        q = q.view(-1, group.longest, q.shape[-1])
        k, v = (rows.view(-1, group.columns, rows.shape[-1]) for rows in (k, v))
        out = _group_attention(q, k, v, group, segments, scaling, reach, softcap)
        outputs.append(out.reshape(query.shape[0], -1, v.shape[-1]))
    return _to_tokens(segments, *outputs)


def _read_attention(
    query: Float[Tensor, "heads tokens dim"],
    keys: Sequence[Float[Tensor, "heads _ dim"]],
    values: Sequence[Float[Tensor, "heads _ value_dim"]],
    segments: Segments,
    read: Sequence[int],
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Float[Tensor, "heads tokens value_dim"]:
    """Attend for the tokens of ``read`` alone: one query each, over the keys of its run."""
    outputs, places = [], []
    for group, (tokens, run, step), k, v in zip(segments.groups, segments.by_group(read), keys, values, strict=True):
        k, v = (rows.view(len(rows), -1, group.columns, rows.shape[-1]) for rows in (k, v))
        each_once = run.tolist() == list(range(len(group.runs)))  # as usual; then keys need no copy
        tokens, run, step = (send(numbers, query.device) for numbers in (tokens, run, step))
        if not each_once:
            k, v = k.index_select(1, run), v.index_select(1, run)
        scores = (query[:, tokens, None] @ k.transpose(2, 3)).float() * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(group.columns, device=run.device) - (group.context + step)[:, None, None]
        unseen = behind > 0 if window is None else (behind > 0) | (behind <= -window)
        outputs.append((torch.softmax(scores.masked_fill(unseen, float("-inf")), -1).to(v.dtype) @ v).squeeze(2))
        places.append(tokens)
    out = torch.cat(outputs, 1)
    return out.new_zeros(*query.shape[:2], out.shape[-1]).index_copy(1, torch.cat(places), out)


class _ToRows(torch.autograd.Function):
    """Copy tokens to the rows of all groups, as queries or as keys with their context.

    Padded rows influence nothing, so their gradients are ignored.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, segments: Segments, as_keys: bool) -> tuple[Tensor, ...]:
        ctx.segments, ctx.as_keys = segments, as_keys
        tokens = tokens.contiguous()  # once here, or index_select does it again for every group
        return tuple(tokens.index_select(1, group.keys if as_keys else group.queries) for group in segments.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        segments: Segments = ctx.segments
        rows = segments.key_rows if ctx.as_keys else segments.query_rows
        own = torch.cat(gradients, 1).index_select(1, rows)
        return _add_contexts(own, gradients, segments) if ctx.as_keys else own, None, None


def _add_contexts(
    own: Float[Tensor, "heads tokens dim"], gradients: Sequence[Float[Tensor, "heads _ dim"]], segments: Segments
) -> Float[Tensor, "heads tokens dim"]:
    """Add to each token's gradient the gradients that it gets as part of the context of other segments."""
    if segments.most_sharers == 0:
        return own
    total = own if segments.most_sharers <= FEW_SHARERS else own.float()
    for group, gradient in zip(segments.groups, gradients, strict=True):
        by_run = gradient.view(len(own), -1, group.columns, own.shape[-1])
        for place, run in enumerate(group.runs):
            column = 0
            for token, length in run.context:
                total[:, token : token + length] += by_run[:, place, column : column + length]
                column += length
    return total.to(own.dtype)


class _ToTokens(torch.autograd.Function):
    """Copy the rows of all groups back to their tokens; the gradient of a padded row is zero."""

    @staticmethod
    def forward(ctx: Any, segments: Segments, *rows: Tensor) -> Tensor:
        ctx.groups = segments.groups
        return torch.cat(rows, 1).index_select(1, segments.query_rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = [gradient.index_select(1, group.queries) for group in ctx.groups]
        real = [r if group.real is None else r.mul_(group.real) for r, group in zip(rows, ctx.groups, strict=True)]
        return None, *real


_to_rows: Callable[[Tensor, Segments, bool], tuple[Tensor, ...]] = _ToRows.apply
_to_tokens: Callable[..., Tensor] = _ToTokens.apply


def _group_attention(
    q: Float[Tensor, "batch query dim"],
    k: Float[Tensor, "batch key dim"],
    v: Float[Tensor, "batch key value_dim"],
    group: Group,
    segments: Segments,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Float[Tensor, "batch query value_dim"]:
    if softcap is not None:
        return _capped(q, k, v, segments.mask(group, window, q.dtype), scaling, softcap)
    longest = LONGEST_KEPT if q.requires_grad or k.requires_grad or v.requires_grad else LONGEST_EXPLICIT
    if q.device.type == "cpu" and q.dtype in LOW_PRECISION and group.columns <= longest:
        return _explicit(q, k, v, segments.mask(group, window, q.dtype), group.context, scaling)
    mask = None if window is None and not group.context else segments.mask(group, window, q.dtype)
    if mask is None:
        k, v = k[:, : group.longest], v[:, : group.longest]
    q, k, v = q[:, None], k[:, None], v[:, None]
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)[:, 0]


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Float[Tensor, "batch query value_dim"]:
    at_once = max(1, SCORES_AT_ONCE // mask.numel())
    outputs = []
    for some_q, some_k, some_v in zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True):
        scores = softcap * torch.tanh(torch.bmm(some_q, some_k.transpose(1, 2)).float() * (scaling / softcap))
        outputs.append(torch.bmm(torch.softmax(scores + mask, -1).to(v.dtype), some_v))
    return torch.cat(outputs)


class _Explicit(torch.autograd.Function):
    """Compute ``P = softmax(scaling * q k^T + mask)`` and ``P v`` in tiles whose scores stay in the cache.

    Backward, with ``dX`` for the gradient of ``X``: ``dP = dout v^T``, ``dS = P * (dP - rowsum(P * dP))``,
    ``dq = scaling * dS k``, ``dk = scaling * dS^T q``, ``dv = P^T dout``. Inputs and outputs are in half precision; products
    and softmax compute in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: int, scaling: float) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        queries, keys = mask.shape
        ctx.tiles, ctx.scaling = list(_tiles(len(q), queries, keys, context)), scaling
        kept = []
        for some, rows, columns in ctx.tiles:
            # Contiguous, since a product of matrices with gaps between them is slow.
            k_tile = k[some, columns].contiguous().transpose(1, 2)
            p = torch.softmax(torch.baddbmm(mask[rows, columns], q[some, rows], k_tile, alpha=scaling), -1)
            out[some, rows] = torch.bmm(p, v[some, columns])
            if any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        for_q, for_k, for_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (some, rows, columns), p in zip(ctx.tiles, kept, strict=True):
            above = gradient[some, rows]
            for_v[some, columns] += torch.bmm(p.transpose(1, 2), above)
            for_p = torch.bmm(above, v[some, columns].transpose(1, 2))
            for_scores = torch.ops.aten._softmax_backward_data(for_p, p, -1, p.dtype)
            for_q[some, rows] = torch.bmm(for_scores, k[some, columns])
            for_k[some, columns] += torch.bmm(for_scores.transpose(1, 2), q[some, rows])
        return for_q.mul_(ctx.scaling), for_k.mul_(ctx.scaling), for_v, None, None, None


_explicit: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor] = _Explicit.apply


def _tiles(batch: int, queries: int, keys: int, context: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of the batch, of the queries, and of the keys up to the last of these queries."""
    for first in range(0, queries, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, queries)
        seen = min(keys, -(-(context + last) // COLUMNS) * COLUMNS)
        at_once = max(1, SCORES_AT_ONCE // ((last - first) * seen))
        for start in range(0, batch, at_once):
            yield slice(start, start + at_once), slice(first, last), slice(0, seen)
