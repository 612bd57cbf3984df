"""Decide which rank runs which sequences in which micro-batch.

Sequences are cut into updates (one optimizer step each) and an update into micro-batches (one run of the model each). Packing
first finds how few micro-batches suffice (best-fit decreasing). As many, rounded up to a multiple of the ranks, are then
filled with even work, and dealt to the ranks so that all of them work on similar amounts at the same time.

Invariants:

- Every sequence is in exactly one micro-batch, and update k holds the k-th chunk of ``order``.
- No micro-batch has more than ``max_tokens`` tokens, and a unit (sequences that stay together, such as a pair) is never split.
- Within an update every rank has the same number of micro-batches, so that collective operations match. Only the last one of
  a rank can be a dummy, which holds no sequence.
- Equal input gives an equal schedule. This is pure Python over lengths: no tensor, no clock, no randomness.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from rlhf_ray.errors import RequestError

MicroBatch = tuple[int, ...]
"""Indices of sequences. An empty one is a dummy: the rank runs a tiny pack of weight 0, so that collectives match."""

ATTENTION_LENGTH = 12_288
"""The length, in tokens, at which attention over a sequence costs as much as all else: 12 times a hidden size of 1,024."""


def work(length: int) -> float:
    """Estimate the cost of a sequence, in tokens: linear layers, plus attention, which grows with the square of its length."""
    return length * (1.0 + length / ATTENTION_LENGTH)


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimizer step: ``micro_batches[rank][k]``, as many for each rank."""

    micro_batches: tuple[tuple[MicroBatch, ...], ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """The indices of all its sequences, ascending."""
        return tuple(sorted(chain.from_iterable(chain.from_iterable(self.micro_batches))))

    def rank(self, rank: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of one rank, in the order in which it runs them."""
        return self.micro_batches[rank]


@dataclass(frozen=True)
class Schedule:
    """All updates, one after another, with the micro-batches of every rank."""

    ranks: int
    max_tokens: int
    updates: tuple[Update, ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """The indices of all sequences, ascending."""
        return tuple(sorted(chain.from_iterable(update.sequences for update in self.updates)))

    def rank(self, rank: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of one rank over all updates, in the order in which it runs them."""
        return tuple(chain.from_iterable(update.rank(rank) for update in self.updates))


def make_schedule(
    lengths: Sequence[int],
    *,
    ranks: int,
    max_tokens: int,
    sequences_per_update: int | None = None,
    order: Sequence[int] | None = None,
    unit: int = 1,
) -> Schedule:
    """Cut sequences into updates, and updates into micro-batches of at most ``max_tokens`` tokens.

    ``lengths[i]`` is the number of tokens of sequence i. ``sequences_per_update`` is None for a single update. ``order`` is a
    permutation of the sequences, None for the order they have. ``unit=2`` keeps each two neighbours of ``order`` in one
    micro-batch, next to each other and in that order. Raises ``RequestError`` for sizes that do not fit.
    """
    order = range(len(lengths)) if order is None else order
    per_update = max(len(order), 1) if sequences_per_update is None else sequences_per_update
    check_sizes(ranks, max_tokens, per_update, unit)
    _check_order(order, len(lengths), unit)
    _check_multiple("sequences_per_update", sequences_per_update, unit)
    units = [make_unit(tuple(order[i : i + unit]), lengths, max_tokens) for i in range(0, len(order), unit)]
    step = per_update // unit or 1
    chunks = (units[i : i + step] for i in range(0, len(units), step))
    return Schedule(ranks, max_tokens, tuple(_make_update(chunk, ranks, max_tokens) for chunk in chunks))


def deal_packs(lengths: Sequence[int], *, ranks: int, max_tokens: int, unit: int = 1) -> Schedule:
    """Schedule a pass without gradients in one update whose packs do not depend on the number of ranks.

    The packs of a single rank are dealt out. Every sequence then runs beside the same others, and gives the same bits, however
    many ranks share the work. For training use :func:`make_schedule`, which balances the work better.
    """
    alone = make_schedule(lengths, ranks=1, max_tokens=max_tokens, unit=unit)
    check_sizes(ranks, max_tokens, 1, unit)
    updates = []
    for update in alone.updates:
        packs = [_Bin(work=sum(work(lengths[i]) for i in pack), units=[Unit(pack, 0, 0.0)]) for pack in update.rank(0)]
        shares = _deal(packs, ranks, -(-len(packs) // ranks))
        updates.append(Update(tuple(tuple(bin.micro_batch() for bin in share) for share in shares)))
    return Schedule(ranks, max_tokens, tuple(updates))


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences that stay together, with their tokens and their work."""

    sequences: tuple[int, ...]
    tokens: int
    work: float


@dataclass(slots=True)
class _Bin:
    """A micro-batch being filled."""

    tokens: int = 0
    work: float = 0.0
    units: list[Unit] = field(default_factory=list)

    def add(self, unit: Unit) -> None:
        self.units.append(unit)
        self.tokens += unit.tokens
        self.work += unit.work

    def micro_batch(self) -> MicroBatch:
        """Return its sequences, units ascending by their first one, so that neighbours in the batch stay neighbours."""
        return tuple(chain.from_iterable(sorted(unit.sequences for unit in self.units)))


def _make_update(units: Sequence[Unit], ranks: int, max_tokens: int) -> Update:
    tight = _best_fit(units, max_tokens)
    per_rank = -(-len(tight) // ranks)
    bins = _spread(units, ranks * per_rank, max_tokens) or tight
    return Update(tuple(tuple(bin.micro_batch() for bin in share) for share in _deal(bins, ranks, per_rank)))


def _best_fit(units: Iterable[Unit], max_tokens: int) -> list[_Bin]:
    """Fill few bins by best-fit decreasing: the longest unit first, into the fullest bin that has room for it."""
    bins: list[_Bin] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the bin), ascending
    for unit in sorted(units, key=lambda unit: -unit.tokens):
        place = bisect_left(room, (unit.tokens, 0))
        if place == len(room):
            number, left = len(bins), max_tokens
            bins.append(_Bin())
        else:
            left, number = room.pop(place)
        bins[number].add(unit)
        entry = (left - unit.tokens, number)
        room.insert(bisect_left(room, entry), entry)
    return bins


def _spread(units: Sequence[Unit], count: int, max_tokens: int) -> list[_Bin] | None:
    """Fill ``count`` bins with even work: the unit with the most work first, into the bin with the least work.

    A bin that once lacked room is set aside until all are; then the bin with the most room is next. Returns None if that one
    has too little.
    """
    bins = [_Bin() for _ in range(count)]
    least_work = [(0.0, number) for number in range(count)]
    most_room: list[tuple[int, int]] = []
    for unit in sorted(units, key=lambda unit: -unit.work):
        while least_work and bins[least_work[0][1]].tokens + unit.tokens > max_tokens:
            number = heapq.heappop(least_work)[1]
            heapq.heappush(most_room, (bins[number].tokens, number))
        if least_work:
            number = least_work[0][1]
            bins[number].add(unit)
            heapq.heapreplace(least_work, (bins[number].work, number))
        else:
            number = most_room[0][1]
            if bins[number].tokens + unit.tokens > max_tokens:
                return None
            bins[number].add(unit)
            heapq.heapreplace(most_room, (bins[number].tokens, number))
    return bins


def _deal(bins: Sequence[_Bin], ranks: int, per_rank: int) -> list[list[_Bin]]:
    """Deal bins in rounds of similar work, the heaviest of each round to the rank with the least work so far.

    Ranks then run micro-batches of similar work at the same time, and have similar work in all.
    """
    heaviest_first = sorted(bins, key=lambda bin: -bin.work)
    heaviest_first += [_Bin() for _ in range(ranks * per_rank - len(bins))]
    shares: list[list[_Bin]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for start in range(0, len(heaviest_first), ranks):
        least_first = sorted(range(ranks), key=lambda rank: (total[rank], rank))
        for rank, bin in zip(least_first, heaviest_first[start : start + ranks], strict=True):
            shares[rank].append(bin)
            total[rank] += bin.work
    return shares


def make_unit(sequences: tuple[int, ...], lengths: Sequence[int], max_tokens: int) -> Unit:
    """Make the unit of these sequences. Raises ``RequestError`` for one that is empty or does not fit into ``max_tokens``."""
    tokens = [lengths[sequence] for sequence in sequences]
    if min(tokens) < 1:
        raise RequestError(
            f"sequence {sequences[tokens.index(min(tokens))]} has {min(tokens)} tokens: it needs one or more"
        )
    if sum(tokens) > max_tokens:
        raise RequestError(
            f"{_subject(sequences)} {sum(tokens)} tokens, but max_tokens_per_micro_batch is {max_tokens}: "
            f"set it to {sum(tokens)} or more, or shorten the sequences"
        )
    return Unit(sequences, sum(tokens), sum(work(length) for length in tokens))


def _subject(sequences: tuple[int, ...]) -> str:
    if len(sequences) == 1:
        return f"sequence {sequences[0]} has"
    return f"sequences {', '.join(map(str, sequences))}, which stay in one micro-batch, have together"


def check_sizes(ranks: int, max_tokens: int, sequences_per_update: int, unit: int) -> None:
    """Raise ``RequestError`` for a size below 1."""
    sizes = {"ranks": ranks, "max_tokens": max_tokens, "sequences_per_update": sequences_per_update, "unit": unit}
    for name, size in sizes.items():
        if size < 1:
            raise RequestError(f"{name} is {size}: it must be 1 or more")


def _check_order(order: Sequence[int], count: int, unit: int) -> None:
    _check_multiple("the number of sequences", len(order), unit)
    seen = bytearray(count)
    for sequence in order:
        if not 0 <= sequence < count:
            raise RequestError(f"order names sequence {sequence}, but there are {count} sequences from 0")
        if seen[sequence]:
            raise RequestError(f"order names sequence {sequence} twice: each must come once")
        seen[sequence] = True
    missing = seen.find(0)
    if missing >= 0:
        raise RequestError(f"order lacks sequence {missing}: each of the {count} sequences must come once")


def _check_multiple(what: str, size: int | None, unit: int) -> None:
    if size is not None and size % unit:
        raise RequestError(
            f"{what} is {size}, but sequences stay together in groups of {unit}: make it a multiple of {unit}"
        )
