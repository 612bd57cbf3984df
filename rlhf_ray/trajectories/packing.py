"""Pack sequences for one run of a model: segments laid end to end, without padding, with shared prefixes computed once.

Invariants:

- A pack holds one segment or more. A segment begins at position 0, or where the earlier segment ends that it continues, which
  is its ``parent``.
- A segment that no other continues ends a sequence. Following the parents back to the start gives the whole sequence.
- Packing changes neither the tokens of a sequence nor the order of tokens and sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Int64, Integer, Shaped
from torch import Tensor

from rlhf_ray.trajectories.batch import TrajectoryBatch, send
from rlhf_ray.trajectories.column_checks import BatchError, check_offsets, describe
from rlhf_ray.trajectories.columns import ROUTED
from rlhf_ray.trajectories.kept_sets import KeptSets

DUMMY_TOKENS = 2
"""Tokens of a dummy pack: one to predict, and one to predict it from."""

SHORTEST_SHARED = 16
"""The shortest prefix, in tokens, that is worth sharing: one more segment has a cost of its own."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The tokens of all segments, the cuts between segments, and the position of each token in its sequence.

    ``parent[i]`` is the number of the earlier segment that segment ``i`` continues (the shared prefix of a pair, or of the
    samples of one prompt), or -1. It is None where no segment continues another. Raises :class:`BatchError` where an invariant
    of this module is broken.
    """

    token_ids: Int64[Tensor, "tokens"]
    offsets: Int64[Tensor, "cuts"]
    position_ids: Int64[Tensor, "tokens"]
    parent: Int64[Tensor, "cuts-1"] | None = None
    kept: KeptSets | None = None
    """The set among which each token was sampled; None where nothing was cut or nobody asks."""
    routed: Integer[Tensor, "tokens routers top_k"] | None = None
    """The experts that the engine sent each token to; None where nobody replays them."""

    def __post_init__(self) -> None:
        check_offsets(self.offsets)
        tokens = len(self.token_ids)
        for name, column, size in (
            ("token_ids", self.token_ids, tokens),
            ("position_ids", self.position_ids, tokens),
            ("parent", self.parent, len(self)),
        ):
            if column is not None and (tuple(column.shape) != (size,) or column.dtype != torch.int64):
                raise BatchError(f"{name} of a pack must be an int64 tensor of shape ({size},), not {describe(column)}")
        if len(self) == 0:
            raise BatchError("a pack needs at least one segment: use Packed.dummy() where there is nothing to run")
        if self.offsets.device.type == "cpu":
            self._check_values()

    def _check_values(self) -> None:
        if int(self.offsets[-1]) != self.num_tokens:
            raise BatchError(f"offsets of a pack end at {int(self.offsets[-1])}, but it has {self.num_tokens} tokens")
        if self.parent is None:
            return
        late = ((self.parent < -1) | (self.parent >= torch.arange(len(self)))).nonzero()
        if len(late):
            row = int(late[0])
            parent = int(self.parent[row])
            raise BatchError(f"segment {row} of a pack cannot continue segment {parent}: give an earlier one, or -1")
        starts = self.position_ids[self.offsets[:-1]]
        ends = self.position_ids[self.offsets[1:] - 1]
        wrong = (starts != torch.where(self.parent < 0, 0, ends[self.parent.clamp(min=0)] + 1)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise BatchError(
                f"segment {row} of a pack begins at position {int(starts[row])}, but it continues segment "
                f"{int(self.parent[row])}: positions go on where that one ends, and begin at 0 without a parent"
            )

    @classmethod
    def dummy(cls, device: torch.device | str = "cpu") -> Packed:
        """Return the smallest pack, for a rank with nothing to run that must take part in collective operations."""
        positions = torch.arange(DUMMY_TOKENS, device=device)
        return cls(torch.zeros_like(positions), torch.tensor([0, DUMMY_TOKENS], device=device), positions)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """The offsets as numbers of the host. A pack that came to a device by :meth:`to` has them without waiting for it."""
        return tuple(self.offsets.tolist())

    @cached_property
    def parents(self) -> tuple[int, ...] | None:
        """``parent`` as numbers of the host."""
        return None if self.parent is None else tuple(self.parent.tolist())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The index in the pack of the last token of each sequence, on the host."""
        return tuple(self.cuts[segment + 1] - 1 for segment in self._last_segments)

    @cached_property
    def longest_sequence(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(sum(self._length(segment) for segment in line) for line in self._lines)

    @cached_property
    def _last_segments(self) -> tuple[int, ...]:
        continued = set(self.parents or ())
        return tuple(segment for segment in range(len(self)) if segment not in continued)

    @cached_property
    def _lines(self) -> tuple[tuple[int, ...], ...]:
        """The segments of each sequence, from the first one on."""
        ancestors = list_ancestors(self.parents or (-1,) * len(self))
        return tuple(ancestors[segment] for segment in self._last_segments)

    def _length(self, segment: int) -> int:
        return self.cuts[segment + 1] - self.cuts[segment]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all segments."""
        return len(self.token_ids)

    @property
    def lengths(self) -> Int64[Tensor, "segments"]:
        """Number of tokens of each segment."""
        return self.offsets.diff()

    @cached_property
    def sequences(self) -> Int64[Tensor, "sequences"]:
        """The numbers of the segments that end a sequence."""
        return self._here(torch.tensor(self._last_segments))

    @cached_property
    def last_tokens(self) -> Int64[Tensor, "sequences"]:
        """The index in the pack of the last token of each sequence."""
        return self._here(torch.tensor(self.ends))

    @cached_property
    def previous_tokens(self) -> Int64[Tensor, "tokens"]:
        """The index in the pack of the token before each token in its sequence; -1 at the first token."""
        return self._here(self._previous_tokens)

    @cached_property
    def predicted_tokens(self) -> Int64[Tensor, "predicted"]:
        """The index in the pack of each token that has one before it in its sequence."""
        return self._here((self._previous_tokens >= 0).nonzero()[:, 0])

    @cached_property
    def _previous_tokens(self) -> Int64[Tensor, "tokens"]:
        before = torch.arange(-1, self.num_tokens - 1)
        for start, parent in zip(self.cuts, self.parents or (-1,) * len(self), strict=False):
            before[start] = self.cuts[parent + 1] - 1  # -1 without a parent
        return before

    @cached_property
    def sequence_tokens(self) -> Int64[Tensor, "sequence_tokens"]:
        """The index in the pack of each token of each sequence, sequence after sequence."""
        tokens = torch.arange(self.num_tokens)
        if self.parent is not None:
            tokens = torch.cat([tokens[self.cuts[s] : self.cuts[s + 1]] for line in self._lines for s in line])
        return self._here(tokens)

    def per_sequence(self, tokens: Shaped[Tensor, "tokens ..."]) -> Shaped[Tensor, "sequence_tokens ..."]:
        """Repeat for every sequence what was computed once for the tokens that it shares."""
        return tokens if self.parent is None else tokens.index_select(0, self.sequence_tokens)

    def unshared(self) -> Packed:
        """Return the same sequences in the same order, each whole and with nothing shared."""
        if self.parent is None:
            return self
        whole = [sum(self._length(segment) for segment in line) for line in self._lines]
        offsets = torch.tensor([0, *whole]).cumsum(0)
        apart = Packed(
            self.token_ids[self.sequence_tokens],
            self._here(offsets),
            self.position_ids[self.sequence_tokens],
            kept=None if self.kept is None else self.kept.select(self.sequence_tokens),
            routed=None if self.routed is None else self.routed[self.sequence_tokens],
        )
        vars(apart)["cuts"] = tuple(offsets.tolist())
        return apart

    def to(self, device: torch.device | str) -> Packed:
        """Return the pack on a device, with its cuts kept on the host, so that no reader waits for the device."""
        parent = None if self.parent is None else send(self.parent, device)
        kept = None if self.kept is None else KeptSets(send(self.kept.sizes, device), send(self.kept.words, device))
        routed = None if self.routed is None else send(self.routed, device)
        ids, offsets, positions = (send(own, device) for own in (self.token_ids, self.offsets, self.position_ids))
        sent = Packed(ids, offsets, positions, parent, kept, routed)
        vars(sent).update(cuts=self.cuts, parents=self.parents)
        return sent

    def _here(self, numbers: Tensor) -> Tensor:
        return send(numbers, self.offsets.device)


def list_ancestors(parent: Sequence[int]) -> list[tuple[int, ...]]:
    """List for each segment the segments that lead to it, from the first one to itself."""
    paths: list[tuple[int, ...]] = []
    for segment, before in enumerate(parent):
        paths.append((segment,) if before < 0 else (*paths[before], segment))
    return paths


def pack(
    batch: TrajectoryBatch,
    indices: Sequence[int] | Tensor | None = None,
    *,
    share_prefixes: bool = True,
    with_kept: bool = False,
    with_routed: bool = False,
) -> Packed:
    """Pack these sequences of the batch in this order, or all of them; an empty list of indices gives the dummy pack.

    Neighbours that begin with the same tokens (the two sides of a pair, the samples of a prompt) share them, unless
    ``share_prefixes`` is off. The results are the same either way, up to rounding. ``with_kept`` takes along the sets among
    which tokens were sampled; a token that was sampled from a cut set is never shared. ``with_routed`` takes along the experts
    that engines sent tokens to; tokens are then shared up to the first that two engines, or one at two times, sent elsewhere.
    """
    batch = batch if with_kept else batch.without_kept()
    batch = batch if with_routed else batch.without_routed()
    chosen = batch if indices is None else batch.select(indices)
    if len(chosen) == 0:
        return Packed.dummy(batch.device)
    routed = chosen.tensors.get(ROUTED)
    whole = Packed(chosen["token_ids"], chosen.offsets, chosen.position_ids, kept=chosen.kept, routed=routed)
    return _share_prefixes(whole, chosen) if share_prefixes and len(chosen) > 1 else whole


def group_by_prefix(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
    """Group the indices of sequences that begin with the same tokens, in an order in which a pack shares their prefixes.

    A group ends before its sequences, each counted whole, have more than ``max_tokens`` tokens.
    """
    groups: list[tuple[int, ...]] = []
    start, room = None, 0
    for number in sorted(range(len(sequences)), key=lambda number: tuple(sequences[number])):
        sequence = sequences[number]
        if start is not None and tuple(sequence[:SHORTEST_SHARED]) == start and len(sequence) <= room:
            groups[-1] += (number,)
        else:
            groups.append((number,))
            start, room = tuple(sequence[:SHORTEST_SHARED]), max_tokens
        room -= len(sequence)
    return groups


def _share_prefixes(whole: Packed, chosen: TrajectoryBatch) -> Packed:
    """Give every run of neighbours with a common prefix one segment for the prefix, and one for the rest of each."""
    cuts = chosen.offsets.tolist()
    ids = whole.token_ids
    if whole.kept is not None:  # another engine or version may have kept others: these tokens are like no other
        ids = torch.where(whole.kept.sizes == 0, ids, -1 - torch.arange(len(ids), device=ids.device))
    columns = [ids] if whole.routed is None else [ids, whole.routed.flatten(1)]
    runs = _find_runs([tuple(column[start:stop] for column in columns) for start, stop in pairwise(cuts)])
    if not any(shared for _, _, shared in runs):
        return whole
    pieces: list[tuple[int, int]] = []
    parent: list[int] = []
    for first, last, shared in runs:
        if shared:
            pieces.append((cuts[first], cuts[first] + shared))
            parent.append(-1)
        prefix = len(pieces) - 1 if shared else -1
        for sequence in range(first, last):
            pieces.append((cuts[sequence] + shared, cuts[sequence + 1]))
            parent.append(prefix)
    tokens = torch.cat([torch.arange(start, stop) for start, stop in pieces]).to(whole.token_ids.device)
    offsets = torch.tensor([0, *(stop - start for start, stop in pieces)]).cumsum(0)
    return Packed(
        whole.token_ids[tokens],
        offsets.to(tokens.device),
        whole.position_ids[tokens],
        torch.tensor(parent, device=tokens.device),
        None if whole.kept is None else whole.kept.select(tokens),
        None if whole.routed is None else whole.routed[tokens],
    )


def _find_runs(sequences: Sequence[tuple[Tensor, ...]]) -> list[tuple[int, int, int]]:
    """Cut sequences into runs ``(first, last + 1, shared)`` of neighbours that begin with the same ``shared`` tokens.

    Tokens are the same where all columns of a sequence are.
    A sequence joins a run if the run then saves more tokens than it does without it. Each keeps one token of its own.
    """
    runs: list[tuple[int, int, int]] = []
    first, shared = 0, len(sequences[0][0]) - 1
    for sequence in range(1, len(sequences)):
        members = sequence - first
        columns = zip(sequences[sequence - 1], sequences[sequence], strict=True)
        common = min(shared, *(_count_shared(*both) for both in columns))
        if common >= SHORTEST_SHARED and members * common > (members - 1) * shared:
            shared = common
        else:
            runs.append((first, sequence, shared if members > 1 else 0))
            first, shared = sequence, len(sequences[sequence][0]) - 1
    return [*runs, (first, len(sequences), shared if len(sequences) - first > 1 else 0)]


def _count_shared(one: Tensor, other: Tensor) -> int:
    """Count the tokens that both begin with, at most all but one of either."""
    most = min(len(one), len(other)) - 1
    differ = (one[:most] != other[:most]).nonzero()
    return int(differ[0, 0]) if len(differ) else most
