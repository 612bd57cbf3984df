"""Ragged batches with gaps in the action mask, and anything wanted at the tokens that are not actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import PER_TOKEN

MakeBatch = Callable[..., TrajectoryBatch]
FLOAT_COLUMNS = [name for name, dtype in PER_TOKEN.items() if dtype == torch.float32]


def make_ragged(lengths: Sequence[int], seed: int = 0, *, poison: float = 0.0) -> TrajectoryBatch:
    """Every column random at actions, ``poison`` at the other tokens; the same actions for every ``poison``."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) < 0.6
    starts = torch.tensor([sum(lengths[:row]) for row in range(len(lengths))], dtype=torch.int64)
    mask[starts] = False
    columns = {name: torch.randn(total, generator=generator) * 0.5 for name in FLOAT_COLUMNS}
    columns = {name: torch.where(mask, column, torch.tensor(poison)) for name, column in columns.items()}
    batch = TrajectoryBatch.from_sequences([list(range(length)) for length in lengths], action_mask=mask, **columns)
    return batch.with_columns(
        score=torch.randn(len(lengths), generator=generator),
        finish_reason=torch.randint(0, 3, (len(lengths),), generator=generator).to(torch.int8),
        bootstrap_value=torch.randn(len(lengths), generator=generator),
        margin=torch.rand(len(lengths), generator=generator),
    )


@pytest.fixture(scope="session")
def ragged() -> MakeBatch:
    """``ragged(lengths, seed, poison=...)`` makes a batch."""
    return make_ragged
