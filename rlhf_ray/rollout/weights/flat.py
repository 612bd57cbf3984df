"""Many small tensors as few flat ones, so that an adapter travels, is summed up and is written at once.

Invariants: what is split is what was joined, bit for bit, in its order. The name of a flat tensor is its contents: the names
and shapes of its parts as JSON. So a checksum over names and bytes covers them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def joined(weights: Iterable[tuple[str, Tensor]], flat_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Neighbours of one dtype end to end; a flat tensor takes no more of them once it holds ``flat_bytes``.

    What it holds is a copy, which no longer changes with the model.
    """
    parts: list[tuple[str, Tensor]] = []
    nbytes = 0
    for name, tensor in weights:
        if parts and (nbytes >= flat_bytes or tensor.dtype != parts[0][1].dtype):
            yield _flat(parts)
            parts, nbytes = [], 0
        parts.append((name, tensor.detach()))
        nbytes += tensor.nbytes
    if parts:
        yield _flat(parts)


def _flat(parts: list[tuple[str, Tensor]]) -> tuple[str, Tensor]:
    contents = json.dumps([[name, list(tensor.shape)] for name, tensor in parts])
    return contents, torch.cat([tensor.reshape(-1) for _, tensor in parts])


def split(contents: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parts of a flat tensor of that name. They share its memory."""
    start = 0
    for name, shape in json.loads(contents):
        end = start + math.prod(shape)
        yield name, flat[start:end].view(shape)
        start = end
