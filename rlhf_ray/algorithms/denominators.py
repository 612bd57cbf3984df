"""Count what the summed loss of an update is divided by.

Invariants:

- The count depends on the sequences of the update alone, never on the ranks or micro-batches that hold them, so the gradient
  of an update is the same for every split.
- It is at least 1: an update in which nothing counts has the gradient 0 instead of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from rlhf_ray.algorithms.masked import count_actions
from rlhf_ray.trajectories.batch import TrajectoryBatch

DenominatorKind = Literal["tokens", "answers", "sequences", "pairs"]


def denominator(kind: DenominatorKind, batch: TrajectoryBatch, sequences: Sequence[int]) -> float:
    """Count the ``kind`` among ``sequences``, which are rows of ``batch``.

    ``tokens`` are action tokens, ``answers`` the sequences with one or more of them, ``sequences`` all of them, and ``pairs``
    half as many. Raises ``ValueError`` for another kind, and for pairs of which one side is missing.
    """
    if kind == "sequences":
        count = len(sequences)
    elif kind == "pairs":
        count = _count_pairs(sequences)
    elif kind in ("tokens", "answers"):
        actions_of_each = count_actions(batch["action_mask"], batch.offsets)
        actions = actions_of_each[torch.as_tensor(tuple(sequences), dtype=torch.int64)]
        count = int(actions.sum() if kind == "tokens" else (actions > 0).sum())
    else:
        raise ValueError(f"denominator {kind!r} is unknown: use one of {', '.join(get_args(DenominatorKind))}")
    return float(max(count, 1))


def _count_pairs(sequences: Sequence[int]) -> int:
    if len(sequences) % 2:
        raise ValueError(f"{len(sequences)} sequences are not whole pairs: keep sequences 2i and 2i+1 together")
    return len(sequences) // 2
