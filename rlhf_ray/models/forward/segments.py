"""The segments of one pack: where each begins, which earlier segment it continues, and how attention batches them.

A segment is a stretch of tokens in the pack. If a prompt has several answers, it is one segment, and each answer is another
one that continues it. A run is one segment, or several in a row that continue each other. A group is a batch of runs.

Invariants: every token is a real query of exactly one group. All runs of a group continue equally many tokens (their
context), so that one causal mask fits them all. Padding repeats a token of its own run and lies behind all of its real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from rlhf_ray.trajectories.batch import send
from rlhf_ray.trajectories.packing import Packed, list_ancestors

COLUMNS = 32
"""Keys are padded to a multiple of this, since torch's softmax on CPU is slow on the rest of a row."""


@dataclass(frozen=True)
class Run:
    """A segment, or several in a row of which each continues the one before it.

    ``context`` holds the ranges (first token, length) of the pack that the run continues, in order.
    """

    start: int
    length: int
    context: tuple[tuple[int, int], ...]

    @property
    def context_length(self) -> int:
        """Number of tokens in the context."""
        return sum(length for _, length in self.context)


@dataclass(frozen=True)
class Group:
    """Runs of similar length that attention computes as one batch, padded to the longest.

    ``queries`` (runs * longest,) holds the index of the token in each row; padding repeats the last token of the run.
    ``real`` is 1 for tokens and 0 for padding, or None if there is no padding. ``keys`` (runs * columns,) holds the context
    of each run, then the run, then padding.
    """

    runs: tuple[Run, ...]
    queries: Int64[Tensor, "rows"]
    keys: Int64[Tensor, "key_rows"]
    real: Float[Tensor, "rows 1"] | None

    @property
    def longest(self) -> int:
        """Queries per run."""
        return self.runs[0].length

    @property
    def context(self) -> int:
        """Keys before the first query of each run: the length of its context."""
        return self.runs[0].context_length

    @property
    def columns(self) -> int:
        """Keys per run."""
        return len(self.keys) // len(self.runs)


@dataclass(eq=False)
class Segments:
    """The segments of one forward pass and what is derived from them, shared by all layers."""

    lengths: tuple[int, ...]
    cu_seq_lens: Int[Tensor, "cuts"]
    parent: tuple[int, ...] | None = None
    """Index of the segment that each one continues, -1 for none; None if none continues another."""
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    attended: int = 0
    """Number of layers that have attended so far in this pass."""
    windowed: int = 0
    """Number of layers among them that passed a sliding window."""
    read: tuple[int, ...] | None = None
    """The tokens whose results are used in the layer that runs now; None for all tokens."""

    @classmethod
    def of_pack(cls, packed: Packed) -> Segments:
        """Make the segments of a pack, from the cuts that it keeps on the host."""
        lengths = tuple(end - start for start, end in pairwise(packed.cuts))
        return cls(lengths, packed.offsets.to(torch.int32), packed.parents)

    @classmethod
    def of(cls, offsets: Int[Tensor, "cuts"], parent: Int64[Tensor, "cuts-1"] | None = None) -> Segments:
        """Make the segments that lie between consecutive offsets, which are read; a GPU is waited for."""
        parents = None if parent is None else tuple(parent.tolist())
        return cls(tuple(offsets.diff().tolist()), offsets.to(torch.int32), parents)

    @property
    def longest(self) -> int:
        """Length of the longest segment."""
        return max(self.lengths)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a model's forward that make its layers attend within these segments."""
        cuts, longest = self.cu_seq_lens, self.longest
        return {
            "cu_seq_lens_q": cuts,
            "cu_seq_lens_k": cuts,
            "max_length_q": longest,
            "max_length_k": longest,
            "packed_segments": self,
        }

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, sorted by the length of their context, then longest runs first."""
        return tuple(self._groups())

    @cached_property
    def query_rows(self) -> Int64[Tensor, "tokens"]:
        """Index of each token among the query rows of all groups."""
        return self._here(self._query_rows)

    @cached_property
    def _query_rows(self) -> Int64[Tensor, "tokens"]:
        return self._rows_of_tokens([(group.longest, 0) for group in self.groups])

    @cached_property
    def key_rows(self) -> Int64[Tensor, "tokens"]:
        """Index of each token of a run (not of a context) among the key rows of all groups."""
        return self._here(self._rows_of_tokens([(group.columns, group.context) for group in self.groups]))

    def by_group(self, tokens: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each group its own among ``tokens`` in the order of its rows, with the run and the place of each.

        All of them lie on the host.
        """
        read = torch.tensor(list(tokens), dtype=torch.int64)
        rows, order = self._query_rows[read].sort()
        base = 0
        for group in self.groups:
            end = base + len(group.queries)
            first, last = torch.searchsorted(rows, rows.new_tensor([base, end])).tolist()
            place = rows[first:last] - base
            yield read[order[first:last]], place // group.longest, place % group.longest
            base = end

    def _here(self, numbers: Tensor) -> Tensor:
        return send(numbers, self.cu_seq_lens.device)

    @cached_property
    def most_sharers(self) -> int:
        """The largest number of runs that have one and the same token in their context."""
        if self.parent is None:
            return 0
        counts = Counter(start for group in self.groups for run in group.runs for start, _ in run.context)
        return max(counts.values(), default=0)

    def mask(self, group: Group, window: int | None, dtype: torch.dtype) -> Float[Tensor, "query key"]:
        """Return the additive causal mask of a group: 0 where a query sees a key, minus infinity elsewhere."""
        key = (group.longest, group.context, window, dtype)
        if key not in self.masks:
            seen = torch.ones(group.longest, group.columns, dtype=torch.bool, device=self.cu_seq_lens.device)
            seen = seen.tril(group.context)
            if window is not None:
                seen = seen.triu(group.context + 1 - window)
            self.masks[key] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return self.masks[key]

    def _runs(self) -> list[Run]:
        """Join each segment to the one right before it if it continues that one; every other segment starts a run."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        lines = list_ancestors(self.parent or (-1,) * len(self.lengths))
        runs: list[Run] = []
        for segment, length in enumerate(self.lengths):
            if len(lines[segment]) > 1 and lines[segment][-2] == segment - 1:
                last = runs.pop()
                runs.append(Run(last.start, last.length + length, last.context))
            else:
                context = tuple((starts[one], self.lengths[one]) for one in lines[segment][:-1])
                runs.append(Run(starts[segment], length, context))
        return runs

    def _groups(self) -> Iterator[Group]:
        """Sort runs by context and length; start a new group where padding would fill more than about an eighth of a run."""
        order = sorted(self._runs(), key=lambda run: (run.context_length, -run.length))
        while order:
            context, longest = order[0].context_length, order[0].length
            shortest = longest - max(4, longest // 8)
            members = [run for run in order if run.context_length == context and run.length >= shortest]
            order = order[len(members) :]
            yield self._group(tuple(members))

    def _group(self, runs: tuple[Run, ...]) -> Group:
        longest, context = runs[0].length, runs[0].context_length
        first, sizes = (
            torch.tensor(numbers)[:, None] for numbers in zip(*((r.start, r.length) for r in runs), strict=True)
        )
        columns = -(-(context + longest) // COLUMNS) * COLUMNS  # rounded up
        rows = first + torch.arange(columns - context).minimum(sizes - 1)
        before = [
            torch.cat([torch.arange(start, start + size) for start, size in run.context]) for run in runs if context
        ]
        keys = torch.cat([torch.stack(before), rows], 1) if context else rows
        steps = torch.arange(longest)
        real = None if int(sizes.min()) == longest else self._here((steps < sizes).float().reshape(-1, 1))
        return Group(runs, self._here(rows[:, :longest].flatten()), self._here(keys.flatten()), real)

    def _rows_of_tokens(self, columns: Sequence[tuple[int, int]]) -> Int64[Tensor, "tokens"]:
        """Return the row of each token, on the host; ``columns`` holds per group the rows of a run and of its context."""
        rows = torch.empty(sum(self.lengths), dtype=torch.int64)
        base = 0
        for group, (count, first) in zip(self.groups, columns, strict=True):
            for place, run in enumerate(group.runs):
                row = base + place * count + first
                rows[run.start : run.start + run.length] = torch.arange(row, row + run.length)
            base += len(group.runs) * count
        return rows

    @cached_property
    def unshared(self) -> tuple[Segments, Int64[Tensor, "sequence_tokens"], Int64[Tensor, "tokens"]]:
        """The same sequences with nothing shared, as three values.

        They are the segments of the whole sequences; for each token of those, its index in this pack; and for each token of
        this pack, its first index in those.
        """
        parent = self.parent or (-1,) * len(self.lengths)
        lines = [line for segment, line in enumerate(list_ancestors(parent)) if segment not in set(parent)]
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        tokens = torch.cat([torch.arange(starts[s], starts[s + 1]) for line in lines for s in line])
        first = torch.full((starts[-1],), len(tokens)).scatter_reduce_(0, tokens, torch.arange(len(tokens)), "amin")
        lengths = tuple(sum(self.lengths[s] for s in line) for line in lines)
        cuts = self._here(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))
        return Segments(lengths, cuts), self._here(tokens), self._here(first)
