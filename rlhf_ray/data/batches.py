"""Examples put together as the batch that a training update runs on.

Invariant: nothing that a row says beside its tokens is lost: numbers that all its pairs have become columns of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.rows.preferences import PAIR_NUMBERS
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class DemonstrationExample:
    """Token ids of a demonstration and which of them are the answer, its end of sequence included."""

    token_ids: list[int]
    action_mask: list[bool]


def make_demonstration_batch(examples: Sequence[DemonstrationExample]) -> TrajectoryBatch:
    """One sequence an example."""
    return TrajectoryBatch.from_sequences(
        [example.token_ids for example in examples], action_mask=[example.action_mask for example in examples]
    )


def make_pair_batch(examples: Sequence[PairExample]) -> TrajectoryBatch:
    """Two sequences an example: 2i is the chosen side, 2i+1 the rejected one.

    Columns ``margin`` and ``grade`` of shape (B,) hold the number of the pair at both of its sequences, where all pairs have
    one.
    """
    sides = [numpy.asarray(side) for example in examples for side in (example.chosen, example.rejected)]
    offsets = numpy.concatenate([[0], numpy.cumsum([len(side) for side in sides])])
    columns = {"token_ids": torch.from_numpy(numpy.concatenate(sides).astype(numpy.int64))}
    for name in PAIR_NUMBERS:
        numbers = [getattr(example, name) for example in examples]
        if None not in numbers:
            columns[name] = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(2)
    return TrajectoryBatch(torch.from_numpy(offsets.astype(numpy.int64)), columns)
