"""Where the segments of one forward pass begin, what each continues, and how they are batched for attention.

Always true: every token is a real query of exactly one group; all segments of a group have a context of the same length
(the tokens of the segments that they continue), so that one mask serves them all; padding repeats a token of its own
segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from rlhf_ray.trajectories.packing import lineage


@dataclass(frozen=True)
class Group:
    """Segments of similar length, run as one batch padded to the longest.

    ``queries`` (segments * longest,) names the token that stands in each row, the last of the segment in padding; ``real``
    is 0 in padding, None without any. ``keys`` (segments * (context + longest),) has the context before each segment.
    """

    longest: int
    context: int
    queries: Int64[Tensor, "rows"]
    keys: Int64[Tensor, "key_rows"]
    real: Float[Tensor, "rows 1"] | None
    borrowed: tuple[tuple[int, int, int, int], ...]
    """What the context of each segment is made of: (segment of the group, column, first token, length)."""


@dataclass(eq=False)
class Segments:
    """The segments of one pass, and what has been derived from it, shared by all layers."""

    lengths: tuple[int, ...]
    cu_seq_lens: Int[Tensor, "segments+1"]
    parent: tuple[int, ...] | None = None
    """The segment that each continues, -1 for none."""
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    attended: int = 0
    """Layers that have attended so far."""
    windowed: int = 0
    """Layers among them that asked for a sliding window."""

    @classmethod
    def of(cls, offsets: Int[Tensor, "segments+1"], parent: Int64[Tensor, "segments"] | None = None) -> Segments:
        """Describe the segments that these offsets cut."""
        parents = None if parent is None else tuple(parent.tolist())
        return cls(tuple(offsets.diff().tolist()), offsets.to(torch.int32), parents)

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

    # -------------------------------------------------------------------------------------- one batch of similar length

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of similar length, those without a context first, then longest first."""
        return tuple(self._groups())

    @cached_property
    def query_rows(self) -> Int64[Tensor, "tokens"]:
        """The row of each token among the query rows of all groups."""
        return self._rows_of_tokens([(group.longest, 0) for group in self.groups])

    @cached_property
    def key_rows(self) -> Int64[Tensor, "tokens"]:
        """The row of each token in its own segment among the key rows of all groups."""
        if self.parent is None:
            return self.query_rows
        return self._rows_of_tokens([(group.context + group.longest, group.context) for group in self.groups])

    def mask(self, group: Group, window: int | None, dtype: torch.dtype) -> Float[Tensor, "query key"]:
        """Return the additive causal mask of a group, with a sliding window if it bites."""
        key = (group.longest, group.context, window, dtype)
        if key not in self.masks:
            rows, columns = group.longest, group.context + group.longest
            seen = torch.ones(rows, columns, dtype=torch.bool, device=self.cu_seq_lens.device).tril(group.context)
            if window is not None:
                seen = seen.triu(group.context + 1 - window)
            self.masks[key] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return self.masks[key]

    def _groups(self) -> Iterator[Group]:
        """Sort by context and length, and cut where a shorter segment would waste more than about an eighth of its rows."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        ancestors = [line[:-1] for line in lineage(self.parent or (-1,) * len(self.lengths))]
        contexts = [sum(self.lengths[ancestor] for ancestor in line) for line in ancestors]
        order = [segment for segment, length in enumerate(self.lengths) if length]
        order.sort(key=lambda segment: (contexts[segment], -self.lengths[segment]))
        while order:
            longest, context = self.lengths[order[0]], contexts[order[0]]
            shortest = longest - max(4, longest // 8)
            members = [s for s in order if contexts[s] == context and self.lengths[s] >= shortest]
            order = order[len(members) :]
            borrowed: list[tuple[int, int, int, int]] = []
            for place, segment in enumerate(members):
                column = 0
                for ancestor in ancestors[segment]:
                    borrowed.append((place, column, starts[ancestor], self.lengths[ancestor]))
                    column += self.lengths[ancestor]
            yield self._group([(starts[s], self.lengths[s]) for s in members], longest, context, tuple(borrowed))

    def _group(
        self,
        members: Sequence[tuple[int, int]],
        longest: int,
        context: int,
        borrowed: tuple[tuple[int, int, int, int], ...],
    ) -> Group:
        device = self.cu_seq_lens.device
        first, sizes = (torch.tensor(numbers)[:, None] for numbers in zip(*members, strict=True))
        steps = torch.arange(longest)[None]
        own = first + steps.minimum(sizes - 1)
        keys = own
        if context:
            before = torch.empty(len(members), context, dtype=torch.int64)
            for place, column, start, length in borrowed:
                before[place, column : column + length] = torch.arange(start, start + length)
            keys = torch.cat([before, own], 1)
        real = None if int(sizes.min()) == longest else (steps < sizes).float().reshape(-1, 1).to(device)
        queries = own.flatten().to(device)
        return Group(longest, context, queries, keys.flatten().to(device) if context else queries, real, borrowed)

    def _rows_of_tokens(self, columns: Sequence[tuple[int, int]]) -> Int64[Tensor, "tokens"]:
        """Rows of the own tokens of each group, whose segments have ``columns`` (count, first own one)."""
        rows = torch.empty(sum(self.lengths), dtype=torch.int64, device=self.cu_seq_lens.device)
        base = 0
        for group, (count, first) in zip(self.groups, columns, strict=True):
            segments = len(group.queries) // group.longest
            places = torch.arange(segments, device=rows.device)[:, None] * count + base + first
            places = (places + torch.arange(group.longest, device=rows.device)).flatten()
            real = slice(None) if group.real is None else group.real[:, 0].bool()
            rows[group.queries[real]] = places[real]
            base += segments * count
        return rows

    # ------------------------------------------------------------------------------------------- sequences, each whole

    @cached_property
    def unshared(self) -> tuple[Segments, Int64[Tensor, "sequence_tokens"], Int64[Tensor, "tokens"]]:
        """The same sequences without anything shared, which token stands at each of theirs, and where each token first
        stands among theirs.
        """
        parent = self.parent or (-1,) * len(self.lengths)
        lines = [line for segment, line in enumerate(lineage(parent)) if segment not in set(parent)]
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        tokens = torch.cat([torch.arange(starts[s], starts[s + 1]) for line in lines for s in line])
        first = torch.full((starts[-1],), len(tokens)).scatter_reduce_(0, tokens, torch.arange(len(tokens)), "amin")
        offsets = torch.tensor([0, *(sum(self.lengths[s] for s in line) for line in lines)]).cumsum(0)
        device = self.cu_seq_lens.device
        return Segments.of(offsets.to(device)), tokens.to(device), first.to(device)
