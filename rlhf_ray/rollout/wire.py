"""The format in which weights travel from the trainer to the engines: names on disk, in buckets, with one checksum.

Invariants:

- The checksum depends on names, dtypes, shapes, bytes and order. It does not depend on how the stream is cut into buckets, nor
  on whether a weight travels as a tensor or as an array.
- An update is accepted only if it holds every weight of the model exactly once, with its shape on disk, and if the checksum of
  what arrived equals the checksum of what was sent.

numpy has no bfloat16, so such a weight travels as an array of the one-field dtype ``BFLOAT16``, which no other weight has.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.errors import WireError

Array = np.ndarray[Any, Any]
Bucket = Sequence[tuple[str, Array | Tensor]]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
BUCKET_BYTES = 64 * 2**20

# Arrays from an object store are read-only and weights are only read: torch's warning about it says nothing new.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


@dataclass(frozen=True)
class PublishedWeights:
    """One publication: plain arrays, so that an object store hands them to every engine without a copy."""

    version: int
    buckets: tuple[tuple[tuple[str, Array], ...], ...]
    checksum: str


def publish(
    version: int, weights: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = BUCKET_BYTES
) -> PublishedWeights:
    """Pack a stream of weights by name on disk; neighbours share a bucket until it holds ``bucket_bytes``.

    Weights on the CPU are not copied: they must not change before the engines have taken them.
    """
    checksum = Checksum()
    buckets: list[list[tuple[str, Array]]] = []
    room = 0
    for name, tensor in weights:
        array = to_array(tensor)
        checksum.add(name, array)
        if room <= 0:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append((name, array))
        room -= array.nbytes
    return PublishedWeights(version, tuple(map(tuple, buckets)), checksum.hexdigest())


def to_array(weight: Array | Tensor) -> Array:
    """A contiguous array with the weight's numbers; shares memory where it can."""
    if not isinstance(weight, Tensor):
        return weight if weight.flags.c_contiguous else weight.copy(order="C")
    tensor = weight.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BFLOAT16)
    return tensor.numpy()


def to_tensor(weight: Array | Tensor) -> Tensor:
    """A tensor with the weight's numbers, which shares its memory and may be read-only: never write into it."""
    if isinstance(weight, Tensor):
        return weight.detach()
    if weight.dtype == BFLOAT16:
        return torch.from_numpy(weight.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(weight)


class Checksum:
    """Of a stream of weights, in order: a hash over names, dtypes, shapes and the CRC of the bytes of each."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, weight: Array | Tensor) -> None:
        """Add one weight to the checksum."""
        array = to_array(weight)
        dtype = "bfloat16" if array.dtype == BFLOAT16 else array.dtype.name
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        self._hash.update(json.dumps([name, dtype, list(array.shape), crc]).encode())

    def hexdigest(self) -> str:
        """The checksum of all weights added so far."""
        return self._hash.hexdigest()


class IncomingUpdate:
    """The receiving side of one update: checks bucket after bucket."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._missing = dict(shapes)
        self._shapes = shapes
        self._checksum = Checksum()

    def accept(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """The bucket's weights as tensors, if each is expected and has its shape."""
        weights = []
        for name, weight in bucket:
            shape = self._missing.pop(name, None)
            if shape is None:
                known = "came twice" if name in self._shapes else "is not the name of a weight of this model"
                raise WireError(f"weight {name!r} {known}")
            if tuple(weight.shape) != shape:
                raise WireError(f"weight {name!r} has shape {tuple(weight.shape)}, but the model's has {shape}")
            tensor = to_tensor(weight)
            self._checksum.add(name, weight)
            weights.append((name, tensor))
        return weights

    def close(self, checksum: str) -> None:
        """Check that nothing is missing and that what arrived is what was sent."""
        if self._missing:
            names = sorted(self._missing)
            raise WireError(f"{len(names)} weights did not come, the first is {names[0]!r}")
        if self._checksum.hexdigest() != checksum:
            raise WireError(f"the weights that came have checksum {self._checksum.hexdigest()}, sent was {checksum}")


def shapes_on_disk(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a Hugging Face directory, from the headers of its safetensors files."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise RequestError(
            f"rollout engine: {directory} holds no *.safetensors file; start it from a directory that the policy wrote"
        )
    return {name: shape for file in files for name, shape in _header(file)}


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (safe_open is not a mapping)
            yield name, tuple(weights.get_slice(name).get_shape())
