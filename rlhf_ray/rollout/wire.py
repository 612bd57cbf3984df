"""The format in which weights travel from the trainer to the engines: names on disk, in buckets, with one checksum.

Invariants:

- The checksum depends on names, dtypes, shapes, bytes and order. It does not depend on how the stream is cut into buckets, nor
  on whether a weight travels as a tensor or as an array, nor on the device that it is on.
- Of a weight on the CPU nothing is copied before its bucket is kept.
- An update is accepted only if it holds every weight of the model exactly once, with its shape on disk, and if the checksum of
  what arrived equals the checksum of what was sent.

numpy has no bfloat16, so such a weight travels as an array of the one-field dtype ``BFLOAT16``, which no other weight has.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.errors import WireError
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.weights.delta import Delta, LastSent
from rlhf_ray.rollout.weights.flat import joined, split

Array = np.ndarray[Any, Any]
Bucket = Sequence[tuple[str, Array | Tensor]]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
BUCKET_BYTES = 64 * 2**20
Content = Literal["weights", "changes", "adapter"]
"""What a publication holds: all weights; what changed, beside them; or an adapter, beside its base."""

# Arrays from an object store are read-only and weights are only read: torch's warning about it says nothing new.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


@dataclass(frozen=True)
class PublishedWeights:
    """One publication; where it is kept in an object store, the buckets are handles."""

    version: int
    buckets: Iterable[Any]
    checksum: str
    delta: Delta | None = None
    """What changed since the publication before, for engines that hold it (``rollout.weight_delta``)."""
    nbytes: int = 0
    """Of all buckets."""
    adapter: PublishedAdapter | None = None
    """What computes with these weights, which then are the same in every version (``rollout.lora: adapter``)."""
    execution: Execution | None = None
    """How the trainer computes log-probs, for engines to be compared with; None: nothing is compared."""

    @property
    def ways(self) -> dict[bool, int]:
        """The bytes that an engine reads, by whether all weights are among them: not if it holds what it needs of them."""
        adapter = 0 if self.adapter is None else self.adapter.tensors.nbytes
        if self.delta is not None:
            return {True: self.nbytes, False: self.delta.nbytes}
        return {True: self.nbytes + adapter} | ({} if self.adapter is None else {False: adapter})

    @property
    def share_to_send(self) -> float:
        """What an engine reads that took the publication before, over all weights."""
        return self.ways.get(False, self.nbytes) / self.nbytes

    @property
    def nbytes_in_all(self) -> int:
        """Of all that is in it."""
        delta = 0 if self.delta is None else self.delta.nbytes
        return self.nbytes + delta + (0 if self.adapter is None else self.adapter.tensors.nbytes)

    def with_buckets(self, found: Callable[[Iterable[Any]], Iterable[Any]]) -> PublishedWeights:
        """The publication with ``found`` of its buckets in the place of them, which are handles."""
        delta = None if self.delta is None else replace(self.delta, buckets=found(self.delta.buckets))
        adapter = (
            None if self.adapter is None else replace(self.adapter, tensors=self.adapter.tensors.with_buckets(found))
        )
        return replace(self, buckets=found(self.buckets), delta=delta, adapter=adapter)


@dataclass(frozen=True)
class PublishedAdapter:
    """A LoRA adapter (Hu et al. 2021) apart from its base."""

    config: Mapping[str, Any]
    """As PEFT writes it."""
    tensors: PublishedWeights
    """Flat ones, which hold the tensors by the names of PEFT (``rollout/weights/flat.py``)."""

    def read(self) -> dict[str, Tensor]:
        """All tensors. Raises :class:`WireError` where they are not those that were sent."""
        update, tensors = Checksum(), dict[str, Tensor]()
        for contents, weight in (pair for bucket in self.tensors.buckets for pair in bucket):
            update.add(contents, weight)
            tensors |= split(contents, to_tensor(weight))
        if update.hexdigest() != self.tensors.checksum:
            raise WireError(
                f"the adapter that came has checksum {update.hexdigest()}, sent was {self.tensors.checksum}"
            )
        return tensors


def as_it_is(bucket: Bucket) -> Any:
    """Keep a bucket where it is: its weights must not change before the engines have taken them."""
    return bucket


def publish(
    version: int,
    weights: Iterable[tuple[str, Tensor]],
    *,
    keep: Callable[[Bucket], Any] = as_it_is,
    bucket_bytes: int = BUCKET_BYTES,
    last: LastSent | None = None,
) -> PublishedWeights:
    """Pack a stream of weights by name on disk; neighbours share a bucket until it holds ``bucket_bytes``.

    Each bucket goes to ``keep`` as soon as it is full, and what that returns is its handle. It holds plain arrays, which an
    object store takes with one copy and hands to every engine of its node without another. With ``last``, what was published
    before, the publication also has its changes since then.
    """
    checksum = Checksum()
    kept: list[Any] = []
    bucket: list[tuple[str, Array]] = []
    nbytes = 0
    if last is not None:
        last.begin()
    for name, tensor in weights:
        whole = tensor.detach().contiguous()
        checksum.add(name, whole)
        bucket.append((name, to_array(whole)))
        nbytes += bucket[-1][1].nbytes
        if last is not None:
            last.add(name, bucket[-1][1], keep, bucket_bytes)
        if sum(array.nbytes for _, array in bucket) >= bucket_bytes:
            kept.append(keep(tuple(bucket)))
            bucket = []
    if bucket:
        kept.append(keep(tuple(bucket)))
    total = checksum.hexdigest()
    delta = None if last is None else last.finish(total, keep)
    return PublishedWeights(version, tuple(kept), total, delta, nbytes)


def publish_adapter(
    version: int,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    keep: Callable[[Bucket], Any] = as_it_is,
    bucket_bytes: int = BUCKET_BYTES,
) -> PublishedAdapter:
    """Pack the tensors of an adapter likewise. They are copied first, into few tensors that each fill a bucket."""
    return PublishedAdapter(
        config, publish(version, joined(tensors, bucket_bytes), keep=keep, bucket_bytes=bucket_bytes)
    )


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
    """Of a stream of weights, in order: a hash over names, dtypes, shapes and the digest of the bytes of each."""

    def __init__(self) -> None:
        self._weights: list[tuple[str, str, tuple[int, ...], Tensor]] = []

    def add(self, name: str, weight: Array | Tensor) -> None:
        """Add one weight to the checksum. On a GPU this only enqueues work."""
        tensor = to_tensor(weight)
        self._weights.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest(tensor)))

    def hexdigest(self) -> str:
        """The checksum of all weights added so far."""
        digests = torch.stack([last.reshape(()) for *_, last in self._weights]).tolist() if self._weights else []
        total = hashlib.sha256()
        for (name, dtype, shape, _), number in zip(self._weights, digests, strict=True):
            total.update(json.dumps([name, dtype, shape, number]).encode())
        return total.hexdigest()


DIGEST_WORDS = 1024


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """A number that depends on every byte of ``tensor`` and on its place, computed where the tensor lies; a scalar, int64.

    The bytes are read as words of 8 in rows of ``DIGEST_WORDS``. The number is the sum of the sums of rows, each times an odd
    number, and of columns, each times an even one, modulo 2**64. So each word counts an odd number of times, and one that
    changed always changes the digest.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # a view of a packed buffer
        data = data.clone()
    whole = data.numel() // (8 * DIGEST_WORDS) * 8 * DIGEST_WORDS
    rest = torch.zeros(8 * DIGEST_WORDS, dtype=torch.uint8, device=data.device)
    rest[: data.numel() - whole] = data[whole:]
    words = data[:whole].view(torch.int64).reshape(-1, DIGEST_WORDS)
    last = rest.view(torch.int64)
    rows = torch.cat([words.sum(1), last.sum(0, keepdim=True)])
    columns = words.sum(0) + last
    return (rows * _factors(len(rows), 1, data.device)).sum() + (columns * _factors(len(columns), 2, data.device)).sum()


def _factors(count: int, first: int, device: torch.device) -> Tensor:
    """``count`` numbers, all odd or all even as ``first`` is, in steps of about 2**64 over the golden ratio."""
    return torch.arange(count, device=device) * -7046029254386353132 + first


class IncomingUpdate:
    """The receiving side of one update: checks bucket after bucket."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._missing = dict(shapes)
        self._shapes = shapes
        self._checksum = Checksum()

    def accept(self, bucket: Bucket) -> list[tuple[str, Tensor]]:
        """The bucket's weights as tensors, if each is expected and has its shape."""
        self.expect((name, tuple(weight.shape)) for name, weight in bucket)
        for name, weight in bucket:
            self._checksum.add(name, weight)
        return [(name, to_tensor(weight)) for name, weight in bucket]

    def expect(self, announced: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Check that the names and shapes are those of weights that have not come yet."""
        for name, came in announced:
            shape = self._missing.pop(name, None)
            if shape is None:
                known = "came twice" if name in self._shapes else "is not the name of a weight of this model"
                raise WireError(f"weight {name!r} {known}")
            if came != shape:
                raise WireError(f"weight {name!r} has shape {came}, but the model's has {shape}")

    def close(self, sent: str, received: Sequence[str] = ()) -> None:
        """Check that nothing is missing and that what arrived is what was sent, by its checksum.

        ``received`` are the checksums of workers that fetched the weights themselves, if they did.
        """
        if self._missing:
            names = sorted(self._missing)
            raise WireError(f"{len(names)} weights did not come, the first is {names[0]!r}")
        for checksum in received or [self._checksum.hexdigest()]:
            if checksum != sent:
                raise WireError(f"the weights that came have checksum {checksum}, sent was {sent}")


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
