"""Causal attention over segments laid end to end, on any device.

Always true: a token attends to the tokens of its own segment up to itself, within the sliding window if there is one,
and to nothing else; padding inside a batch of segments influences neither results nor gradients.

Segments of similar length run as one batch, so that the cost follows the lengths and not the square of the pack. On
CPU, explicit half-precision products around a softmax that computes in fp32 take half the time of torch's flash
kernel, backward included, up to some hundreds of tokens; longer segments go to the kernel, which keeps no scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional

LONGEST_EXPLICIT = 512
"""Segments up to this length keep their attention scores (half precision on CPU)."""
SCORES_AT_ONCE = 1 << 19
"""Scores of one explicit product: they should stay in the cache between product, softmax and product."""


@dataclass(frozen=True)
class Group:
    """Segments of similar length, run as one batch padded to the longest.

    ``rows`` (segments * longest,) names the token that stands in each row, the last of the segment in padding; ``real``
    is 0 in padding, None without any.
    """

    longest: int
    rows: Int64[Tensor, "rows"]
    real: Float[Tensor, "rows 1"] | None


@dataclass(eq=False)
class Segments:
    """Where the segments of one forward pass begin, and what has been derived from it, shared by all layers."""

    lengths: tuple[int, ...]
    cu_seq_lens: Int[Tensor, "segments+1"]
    groups: tuple[Group, ...] | None = None
    row_of_token: Int64[Tensor, "tokens"] | None = None
    masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    attended: int = 0
    """Layers that have attended so far."""
    windowed: int = 0
    """Layers among them that asked for a sliding window."""

    @classmethod
    def of(cls, offsets: Int[Tensor, "segments+1"]) -> Segments:
        """Describe the segments that these offsets cut."""
        return cls(tuple(offsets.diff().tolist()), offsets.to(torch.int32))

    @property
    def longest(self) -> int:
        """Length of the longest segment."""
        return max(self.lengths)

    def arguments(self) -> dict[str, Any]:
        """Return what a model's forward must be given for its layers to attend within these segments."""
        cuts, longest = self.cu_seq_lens, self.longest
        return {
            "cu_seq_lens_q": cuts,
            "cu_seq_lens_k": cuts,
            "max_length_q": longest,
            "max_length_k": longest,
            "packed_segments": self,
        }

    def batches(self) -> tuple[Group, ...]:
        """Return the groups of similar length, longest first."""
        if self.groups is None:
            self.groups = tuple(_groups(self.lengths, self.cu_seq_lens.device))
            self.row_of_token = _inverse(self.groups, sum(self.lengths))
        return self.groups

    def mask(self, longest: int, window: int | None, dtype: torch.dtype) -> Float[Tensor, "query key"]:
        """Return the additive causal mask of a group, with a sliding window if it bites."""
        key = (longest, window, dtype)
        if key not in self.masks:
            seen = torch.ones(longest, longest, dtype=torch.bool, device=self.cu_seq_lens.device).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            self.masks[key] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return self.masks[key]


def _groups(lengths: Sequence[int], device: torch.device) -> list[Group]:
    """Sort segments by length and cut where a shorter one would waste more than about an eighth of its rows."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
    groups: list[Group] = []
    while order:
        longest = lengths[order[0]]
        members = [index for index in order if lengths[index] >= longest - max(4, longest // 8)]
        order = order[len(members) :]
        sizes = torch.tensor([lengths[index] for index in members])[:, None]
        first = torch.tensor([starts[index] for index in members])[:, None]
        steps = torch.arange(longest)[None]
        rows = (first + steps.minimum(sizes - 1)).flatten().to(device)
        real = None if int(sizes.min()) == longest else (steps < sizes).float().reshape(-1, 1).to(device)
        groups.append(Group(longest, rows, real))
    return groups


def _inverse(groups: Sequence[Group], tokens: int) -> Int64[Tensor, "tokens"]:
    """Find the row of each token among the rows of all groups; where padding repeats a token, its first row."""
    rows = torch.cat([group.rows for group in groups])
    places = torch.arange(len(rows), device=rows.device)
    return torch.full((tokens,), len(rows), device=rows.device).scatter_reduce_(0, rows, places, "amin")


class _ToRows(torch.autograd.Function):
    """Tokens to the rows of all groups. Padded rows influence nothing, so their gradients are dropped unread."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, groups: Sequence[Group], row_of_token: Tensor) -> tuple[Tensor, ...]:
        ctx.row_of_token = row_of_token
        return tuple(tokens.index_select(1, group.rows) for group in groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(gradients, 1).index_select(1, ctx.row_of_token), None, None


class _ToTokens(torch.autograd.Function):
    """Rows of all groups back to tokens; the gradient of a padded row is zero."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[Group], row_of_token: Tensor, *rows: Tensor) -> Tensor:
        ctx.groups = groups
        return torch.cat(rows, 1).index_select(1, row_of_token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = [gradient.index_select(1, group.rows) for group in ctx.groups]
        kept = [r if group.real is None else r.mul_(group.real) for r, group in zip(rows, ctx.groups, strict=True)]
        return None, None, *kept


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
    """Causal attention within each segment: ``softmax(scaling * q k^T + mask) v``, scores capped by ``softcap``."""
    repeats = query.shape[0] // key.shape[0]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    groups, inverse = segments.batches(), segments.row_of_token
    queries, keys, values = (_ToRows.apply(tensor, groups, inverse) for tensor in (query, key, value))
    outputs = []
    for group, q, k, v in zip(groups, queries, keys, values, strict=True):
        batch = (-1, group.longest, q.shape[-1])
        bites = window if window is not None and window < group.longest else None
        out = _group_attention(
            q.view(batch), k.view(batch), v.view(-1, group.longest, v.shape[-1]), segments, scaling, bites, softcap
        )
        outputs.append(out.reshape(query.shape[0], -1, v.shape[-1]))
    return _ToTokens.apply(groups, inverse, *outputs)


def _group_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, window: int | None, softcap: float | None
) -> Float[Tensor, "batch query value_dim"]:
    longest = q.shape[1]
    half_on_cpu = q.device.type == "cpu" and q.dtype != torch.float32
    if softcap is None and not (half_on_cpu and longest <= LONGEST_EXPLICIT):
        mask = None if window is None else segments.mask(longest, window, q.dtype)
        q, k, v = q[:, None], k[:, None], v[:, None]
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)[:, 0]
    mask = segments.mask(longest, window, q.dtype)
    at_once = max(1, SCORES_AT_ONCE // longest**2)
    tiles = zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True)
    return torch.cat([_explicit(*tile, mask, scaling, softcap) for tile in tiles])


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> Float[Tensor, "batch query value_dim"]:
    if softcap is None:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling)
        return torch.bmm(torch.softmax(scores, -1), v)  # half precision in and out, fp32 inside
    scores = softcap * torch.tanh(torch.bmm(q, k.transpose(1, 2)).float() * (scaling / softcap))
    return torch.bmm(torch.softmax(scores + mask, -1).to(v.dtype), v)
