"""Which rank runs which sequences in which micro-batch.

Always true: every sequence is in exactly one micro-batch; update k holds the k-th chunk of ``order``; no micro-batch
has more than ``max_tokens`` tokens; a unit (a pair) is never split; within an update every rank has the same number of
micro-batches (only a rank's last one can be a dummy), in all what best-fit packing needs, rounded up to the ranks; and
equal input gives an equal schedule.

Pure Python over lengths: no tensor, no clock, no chance.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from rlhf_ray.errors import RequestError

MicroBatch = tuple[int, ...]
"""Indices of sequences. An empty one is a dummy: the rank runs a tiny pack of zero weight, for the collectives."""

ATTENTION_LENGTH = 12_288
"""Length at which the attention over a sequence costs as much as everything else: 12 times a hidden size of 1,024."""


def work(length: int) -> float:
    """Estimate the cost of a sequence in tokens: linear layers, and attention that grows with the square."""
    return length * (1.0 + length / ATTENTION_LENGTH)


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimizer step: ``micro_batches[rank][k]``, as many for each rank."""

    micro_batches: tuple[tuple[MicroBatch, ...], ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Indices of all its sequences, ascending."""
        return tuple(sorted(chain.from_iterable(chain.from_iterable(self.micro_batches))))

    def rank(self, rank: int) -> tuple[MicroBatch, ...]:
        """Micro-batches of one rank, in the order it runs them."""
        return self.micro_batches[rank]


@dataclass(frozen=True)
class Schedule:
    """What every rank runs: updates one after another."""

    ranks: int
    max_tokens: int
    updates: tuple[Update, ...]

    @property
    def num_updates(self) -> int:
        """Number of optimizer steps."""
        return len(self.updates)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Indices of all sequences, ascending."""
        return tuple(sorted(chain.from_iterable(update.sequences for update in self.updates)))

    def rank(self, rank: int) -> tuple[MicroBatch, ...]:
        """Micro-batches of one rank over all updates, in the order it runs them."""
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
    """Cut sequences into updates (``None``: one) and updates into micro-batches under a token budget.

    ``lengths[i]`` is the number of tokens of sequence i; ``order`` is a permutation of the sequences, None for as is.
    ``unit=2`` keeps each two neighbours of ``order`` in one micro-batch, next to each other and in that order.
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
    """All sequences in one update for a pass without gradients, whose packs do not depend on the number of ranks.

    They are those of a single rank, dealt: every sequence has the same company in its forward, and so the same bits come
    out, however many ranks share the work. For training :func:`make_schedule` does better, which balances.
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
    """Sequences that stay together."""

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
        """Ascending by first sequence, so that neighbours in the batch stay neighbours."""
        return tuple(chain.from_iterable(sorted(unit.sequences for unit in self.units)))


def _make_update(units: Sequence[Unit], ranks: int, max_tokens: int) -> Update:
    tight = _best_fit(units, max_tokens)
    per_rank = -(-len(tight) // ranks)
    bins = _spread(units, ranks * per_rank, max_tokens) or tight
    return Update(tuple(tuple(bin.micro_batch() for bin in share) for share in _deal(bins, ranks, per_rank)))


def _best_fit(units: Iterable[Unit], max_tokens: int) -> list[_Bin]:
    """Fill as few bins as best-fit decreasing does: the longest unit first, into the fullest bin that has room."""
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
    """Fill ``count`` bins with even work: the most work first, into the bin with the least that has room.

    A bin that once lacked room waits until all have: then the one with most room is next. None if that has too little.
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
    """Deal bins in rounds of about equal work, each round's heaviest to the rank that has the least so far.

    Ranks then run micro-batches of about equal work at the same time, and have about equal work in all.
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
    """The unit of these sequences; one that is empty, or does not fit into ``max_tokens``, is refused by its number."""
    tokens = [lengths[sequence] for sequence in sequences]
    if min(tokens) < 1:
        raise RequestError(
            f"sequence {sequences[tokens.index(min(tokens))]} has {min(tokens)} tokens: it needs one or more"
        )
    if sum(tokens) > max_tokens:
        raise RequestError(
            f"{_name(sequences)} {sum(tokens)} tokens, but max_tokens_per_micro_batch is {max_tokens}: "
            f"set it to {sum(tokens)} or more, or shorten the sequences"
        )
    return Unit(sequences, sum(tokens), sum(work(length) for length in tokens))


def _name(sequences: tuple[int, ...]) -> str:
    if len(sequences) == 1:
        return f"sequence {sequences[0]} has"
    return f"sequences {', '.join(map(str, sequences))}, which stay in one micro-batch, have together"


def check_sizes(ranks: int, max_tokens: int, sequences_per_update: int, unit: int) -> None:
    """Refuse sizes below 1, by name."""
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
