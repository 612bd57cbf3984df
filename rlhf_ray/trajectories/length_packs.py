"""Cut sequences into packs of similar lengths, for passes in which the ranks need not wait for each other.

A stream is one thread of a rank, and takes its next pack as soon as it is free. On CPU, attention runs sequences of one length
as a batch, so similar lengths belong together. Each pack takes a share of the work that is left (guided self-scheduling,
Polychronopoulos and Kuck 1987): large packs come first, and small ones fill the end. What fits into one pack per stream is
shared out evenly.

Invariants:

- Every sequence is in exactly one pack, no pack has more than ``max_tokens`` tokens, and a unit (sequences that stay together)
  is never split.
- Every rank starts with its longest units. All streams end within the work of :data:`SMALLEST_PACK` tokens and of one unit,
  the largest, of each other.
- Equal input gives equal packs. This is pure Python over lengths: no tensor, no clock, no randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from rlhf_ray.trajectories.schedule import MicroBatch, Unit, check_sizes, make_unit

SMALLEST_PACK = 1024
"""The smallest pack that is worth its fixed cost, in tokens."""
SHARE_OF_THE_REST = 2 / 3
"""The part of the remaining work of a stream that one pack takes."""


def make_length_packs(
    lengths: Sequence[int], units: Sequence[Sequence[int]], *, ranks: int, streams: int, max_tokens: int
) -> list[list[MicroBatch]]:
    """Return the packs of each rank, in the order in which its ``streams`` take them.

    ``lengths[i]`` is the number of tokens of sequence i. ``units`` are tuples of sequences that stay together, in their order;
    a unit counts as long as its longest sequence. A single stream has nobody to wait for, so its packs are as large as
    ``max_tokens`` allows. Raises ``RequestError`` for a unit that does not fit, and for sizes below 1.
    """
    check_sizes(ranks, max_tokens, 1, 1)
    longest_first = [make_unit(tuple(unit), lengths, max_tokens) for unit in units]
    longest_first.sort(key=lambda unit: -max(lengths[sequence] for sequence in unit.sequences))
    packs_of_ranks: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    ends = [0.0] * (ranks * streams)  # the work of each stream so far; stream i belongs to rank i % ranks
    for pack in _cut(longest_first, len(ends), max_tokens):
        first_free = ends.index(min(ends))
        packs_of_ranks[first_free % ranks].append(tuple(chain.from_iterable(unit.sequences for unit in pack)))
        ends[first_free] += sum(unit.work for unit in pack)
    return packs_of_ranks


def _cut(units: Sequence[Unit], streams: int, max_tokens: int) -> list[list[Unit]]:
    """Cut units into packs: where a pack is closest to its share of the work, or before it would be too large."""
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
