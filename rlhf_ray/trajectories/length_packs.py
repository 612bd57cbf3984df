"""Packs of like lengths for a pass in which no ranks meet: each stream of a rank takes the next as soon as it is free.

Always true: every sequence is in exactly one pack; no pack has more than ``max_tokens`` tokens; a unit is never split;
every rank has the longest units first; all streams end within the work of :data:`SMALLEST_PACK` tokens and of one unit, the
largest, of each other; equal input gives equal packs.

On CPU, attention runs sequences of one length as a batch. Each pack has a part of what is left (guided self-scheduling,
Polychronopoulos and Kuck 1987), so that large ones go first and small ones fill the end; what fits into one pack a stream
is shared out evenly.

Pure Python over lengths: no tensor, no clock, no chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from rlhf_ray.trajectories.schedule import MicroBatch, Unit, check_sizes, make_unit

SMALLEST_PACK = 1024
"""Tokens of a pack, where there are so many for each stream: what a pack costs besides them stays small."""
SHARE_OF_THE_REST = 2 / 3
"""The part that a pack has of what is left for each stream."""


def make_length_packs(
    lengths: Sequence[int], units: Sequence[Sequence[int]], *, ranks: int, streams: int, max_tokens: int
) -> list[list[MicroBatch]]:
    """The packs of each rank, in the order in which its ``streams`` take them.

    ``units`` are sequences that stay together, in their order; each is as long as its longest. A single stream has nobody
    to wait for: its packs are as large as ``max_tokens`` allows.
    """
    check_sizes(ranks, max_tokens, 1, 1)
    made = [make_unit(tuple(unit), lengths, max_tokens) for unit in units]
    made.sort(key=lambda unit: -max(lengths[sequence] for sequence in unit.sequences))
    dealt: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    ends = [0.0] * (ranks * streams)
    for pack in _cut(made, len(ends), max_tokens):
        first_free = ends.index(min(ends))
        dealt[first_free % ranks].append(tuple(chain.from_iterable(unit.sequences for unit in pack)))
        ends[first_free] += sum(unit.work for unit in pack)
    return dealt


def _cut(units: Sequence[Unit], streams: int, max_tokens: int) -> list[list[Unit]]:
    """Cut where a pack is closest to its share, or before it would be too large."""
    left = sum(unit.work for unit in units)
    few = streams == 1 or sum(unit.tokens for unit in units) <= streams * max_tokens
    packs: list[list[Unit]] = []
    share = work = tokens = 0.0
    for unit in units:
        if not packs or tokens + unit.tokens > max_tokens or work + unit.work / 2 > share:
            idle = max(1, streams - len(packs))
            fewest = left if few and len(packs) < streams else SMALLEST_PACK
            share = max(SHARE_OF_THE_REST * left / streams, min(fewest, left / idle))
            packs.append([])
            work, tokens = 0.0, 0
        packs[-1].append(unit)
        work, tokens, left = work + unit.work, tokens + unit.tokens, left - unit.work
    return packs
