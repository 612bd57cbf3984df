"""The experts that each router of a mixture sent each token to, as the rollout engine chose them.

A router picks the ``top_k`` experts with the highest scores. Where two scores almost tie, an engine and a trainer whose last
bits differ pick other ones, and the log-probs of all later tokens differ by far more than rounding. So the engine's choice
travels with the token, and the trainer replays it (R3, rollout routing replay: Ma et al. 2025, "Stabilizing MoE
Reinforcement Learning by Aligning Training and Inference Routers").

Invariant: a token that no engine has read has :data:`NO_EXPERT` everywhere, and the trainer's own router sends it. The last
token of an answer is one: it was sampled, and nothing was computed from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64, Integer
from torch import Tensor

NO_EXPERT = -1
"""The expert of a token that no engine has read."""
BYTE_EXPERTS = 255
"""Most experts whose numbers, and one number that is none of them, fit into a byte."""


def experts_dtype(experts: int) -> torch.dtype:
    """The narrowest dtype of a column that holds numbers of so many experts."""
    return torch.uint8 if experts <= BYTE_EXPERTS else torch.int16


def complete(
    read: Sequence[Integer[Tensor, "_ routers top_k"]], lengths: Sequence[int]
) -> Integer[Tensor, "tokens routers top_k"]:
    """Put the tokens of all sequences one after another; those of a sequence that come behind the ones read have no experts.

    Raises :class:`ValueError` where a sequence has fewer tokens than were read of it.
    """
    rows = []
    for own, length in zip(read, lengths, strict=True):
        if len(own) > length:
            raise ValueError(f"experts of {len(own)} tokens were read, but the sequence has {length}")
        rows += [own, own.new_full((length - len(own), *own.shape[1:]), _missing(own.dtype))]
    return torch.cat(rows)


def numbers(column: Integer[Tensor, "tokens routers top_k"]) -> Int64[Tensor, "routers tokens top_k"]:
    """Return what each router replays: the numbers of experts, or :data:`NO_EXPERT`."""
    own = column.transpose(0, 1).long().contiguous()
    return own.masked_fill_(own == _missing(column.dtype), NO_EXPERT)


def _missing(dtype: torch.dtype) -> int:
    return BYTE_EXPERTS if dtype == torch.uint8 else NO_EXPERT
