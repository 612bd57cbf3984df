"""Cut sequences into padded batches of similar lengths, for models that cannot run packed.

Invariants: every sequence is in exactly one batch; a batch of several sequences has at most ``max_tokens`` tokens, padding
included, and its shortest sequence is at least :data:`SHORTEST` of its longest. Equal input gives equal batches. This is pure
Python over lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.trajectories.schedule import MicroBatch

SHORTEST = 0.85
"""The shortest sequence of a batch has at least this share of the tokens of the longest."""
ALIKE = 8
"""Lengths that differ by no more tokens than this are always alike: for short sequences a batch costs more than padding."""


def make_length_batches(lengths: Sequence[int], *, max_tokens: int, padded: bool = True) -> list[MicroBatch]:
    """Return batches of indices of ``lengths``, the longest first; without ``padded`` a batch holds one length only."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fewest = min(longest * SHORTEST, longest - ALIKE) if padded else longest
        if not batches or lengths[index] < fewest or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return [tuple(batch) for batch in batches]
