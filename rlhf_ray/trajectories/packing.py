"""What a model is run on: segments laid end to end, without padding.

Always true: a pack holds at least one segment; every segment is a whole sequence whose positions start at 0 (unless it
continues a parent); packing neither changes nor reorders a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import BatchError, check_offsets, describe

DUMMY_TOKENS = 2
"""Tokens of a dummy pack: one to predict and one to predict it from."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Token ids of segments, where each is cut, the position of each token in its segment.

    ``parent[i]`` names the earlier segment whose tokens segment ``i`` continues (the shared prefix of a pair or of the
    samples of one prompt), -1 for none.
    """

    token_ids: Int64[Tensor, "tokens"]
    offsets: Int64[Tensor, "segments+1"]
    position_ids: Int64[Tensor, "tokens"]
    parent: Int64[Tensor, "segments"] | None = None

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
        if self.parent is not None:
            late = ((self.parent < -1) | (self.parent >= torch.arange(len(self)))).nonzero()
            if len(late):
                row = int(late[0])
                parent = int(self.parent[row])
                raise BatchError(
                    f"segment {row} of a pack cannot continue segment {parent}: give an earlier one, or -1"
                )

    @classmethod
    def dummy(cls, device: torch.device | str = "cpu") -> Packed:
        """Return the smallest pack, for a rank that has nothing to run but must take part in the collectives."""
        positions = torch.arange(DUMMY_TOKENS, device=device)
        return cls(torch.zeros_like(positions), torch.tensor([0, DUMMY_TOKENS], device=device), positions)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all segments."""
        return len(self.token_ids)

    @property
    def lengths(self) -> Int64[Tensor, "segments"]:
        """Number of tokens of each segment."""
        return self.offsets.diff()

    def to(self, device: torch.device | str) -> Packed:
        """Return the pack on a device."""
        parent = None if self.parent is None else self.parent.to(device)
        return Packed(self.token_ids.to(device), self.offsets.to(device), self.position_ids.to(device), parent)


def pack(batch: TrajectoryBatch, indices: Sequence[int] | Tensor | None = None) -> Packed:
    """Pack these sequences of the batch in this order (all of them without ``indices``); none gives the dummy."""
    chosen = batch if indices is None else batch.select(indices)
    if len(chosen) == 0:
        return Packed.dummy(batch.device)
    return Packed(chosen["token_ids"], chosen.offsets, chosen.position_ids)
