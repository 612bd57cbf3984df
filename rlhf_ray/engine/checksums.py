"""A checksum over weights as they travel.

Always true: it changes with every bit of every tensor, with its name, dtype and shape, and with the order; it is the same
for the same stream however the stream was cut into groups, and whether tensors come from torch or numpy.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Checksum:
    """CRC-32 of a stream of named tensors, added one by one."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, name: str, tensor: Tensor | np.ndarray) -> None:
        """Take in one tensor."""
        held = tensor if isinstance(tensor, np.ndarray) else tensor.detach().cpu().contiguous()
        dtype = str(held.dtype).removeprefix("torch.")
        header = f"{name}\0{dtype}\0{tuple(held.shape)}\0".encode()
        raw = np.ascontiguousarray(held) if isinstance(held, np.ndarray) else held.reshape(-1).view(torch.uint8).numpy()
        self.value = zlib.crc32(raw, zlib.crc32(header, self.value))


def checksum(stream: Iterable[tuple[str, Tensor]]) -> int:
    """The checksum of a whole stream."""
    total = Checksum()
    for name, tensor in stream:
        total.add(name, tensor)
    return total.value
