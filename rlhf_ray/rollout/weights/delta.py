"""What changed in the weights since the last publication, for links on which all of them would take too long.

Invariants: an element has changed if its bits have. Of each weight the smallest of three forms travels: its changed elements
with their indices, the same with one bit for each element, or all of it; what would come to more than ``DELTA_SHARE`` of all
weights is no delta. Both sides keep a copy of the last version. A delta applies to that version alone, which its checksum
names, and the weights that come out are checked like any others. They are whole weights, since an engine that gets a part of a
fused layer computes garbage.

At a small learning rate most weights in bf16 stay as they were from step to step, because a change that is smaller than half
their spacing is kept in the fp32 copy of the optimizer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_ray.config.sections.rollout import DELTA_SHARE
from rlhf_ray.rollout.errors import WireError

Array = np.ndarray[Any, Any]
Form = Literal["indices", "bitmap", "whole"]


@dataclass(frozen=True)
class WeightChange:
    """What a weight became: ``values`` are those of the elements that changed, or of all of them in the form ``whole``."""

    name: str
    form: Form
    where: Array
    """Of the changed elements: their flat indices (uint32), or one bit for each element (uint8); empty for ``whole``."""
    values: Array

    @property
    def nbytes(self) -> int:
        """What it weighs on the wire, without its name."""
        return self.where.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Delta:
    """The way from one publication to the next; where it is kept in an object store, the buckets are handles."""

    base: str
    """The checksum of the publication that it applies to."""
    buckets: Iterable[Any]
    """Of :class:`WeightChange`."""
    nbytes: int
    """Of all buckets, indices and bitmaps included."""


def change_of(name: str, before: Array, after: Array) -> WeightChange:
    """What turns ``before`` into ``after``, which have one dtype and shape, in the smallest form."""
    changed = _bits(before) != _bits(after)
    count = int(np.count_nonzero(changed))
    size, itemsize = changed.size, after.dtype.itemsize
    sizes: dict[Form, int] = {
        "indices": count * (4 + itemsize),
        "bitmap": -(-size // 8) + count * itemsize,
        "whole": size * itemsize,
    }
    form = min(sizes, key=lambda one: sizes[one]) if size <= 2**32 else "whole"
    if form == "whole":
        return WeightChange(name, form, np.empty(0, np.uint8), after)
    where = np.flatnonzero(changed).astype(np.uint32) if form == "indices" else np.packbits(changed)
    return WeightChange(name, form, where, after.reshape(-1)[changed])


def apply_change(change: WeightChange, held: Array) -> None:
    """Turn ``held`` into what the weight became, in place. Raises :class:`WireError` if it is of another weight."""
    if change.values.dtype != held.dtype:
        raise WireError(f"weight {change.name!r} changed to dtype {change.values.dtype} from {held.dtype}")
    if change.form == "whole":
        if change.values.shape != held.shape:
            raise WireError(f"weight {change.name!r} changed to shape {change.values.shape} from {held.shape}")
        held[...] = change.values
        return
    flat = held.reshape(-1)
    where = change.where
    if change.form == "bitmap":
        where = np.flatnonzero(np.unpackbits(where, count=flat.size))
    if len(where) != len(change.values) or (len(where) and int(where[-1]) >= flat.size):
        raise WireError(
            f"{len(change.values)} changed elements of weight {change.name!r} do not fit its shape {held.shape}"
        )
    flat[where] = change.values


def _bits(weight: Array) -> Array:
    return weight.reshape(-1).view(np.dtype(f"u{weight.dtype.itemsize}"))


class LastSent:
    """The trainer's copy of what it published last."""

    def __init__(self) -> None:
        self._weights: dict[str, Array] = {}
        self._checksum: str | None = None
        self._base: str | None = None
        self._buckets: list[Any] = []
        self._bucket: list[WeightChange] = []
        self._nbytes = self._total = 0

    def begin(self) -> None:
        """Begin a publication. One that never ends leaves nothing that a delta could apply to."""
        self._base, self._checksum = self._checksum, None
        self._buckets, self._bucket, self._nbytes = [], [], 0
        self._total = sum(weight.nbytes for weight in self._weights.values())

    def add(self, name: str, weight: Array, keep: Callable[[Any], Any], bucket_bytes: int) -> None:
        """Add a weight of the publication that is being made, and remember it as sent."""
        held = self._weights.get(name)
        if held is None or held.dtype != weight.dtype or held.shape != weight.shape:
            self._weights[name] = weight.copy()
            self._base = None  # nothing of that shape was sent
            return
        if self._base is not None:
            self._add_change(change_of(name, held, weight), keep, bucket_bytes)
        held[...] = weight

    def _add_change(self, change: WeightChange, keep: Callable[[Any], Any], bucket_bytes: int) -> None:
        self._nbytes += change.nbytes
        if self._nbytes > DELTA_SHARE * self._total:
            self._base, self._buckets, self._bucket = None, [], []
            return
        self._bucket.append(change)
        if sum(one.nbytes for one in self._bucket) >= bucket_bytes:
            self._close_bucket(keep)

    def finish(self, checksum: str, keep: Callable[[Any], Any]) -> Delta | None:
        """End a publication with its ``checksum``; returns the way to it from the one before, if that is worth it."""
        self._checksum = checksum
        if self._base is None:
            return None
        if self._bucket:
            self._close_bucket(keep)
        buckets, self._buckets = self._buckets, []
        return Delta(self._base, tuple(buckets), self._nbytes)

    def _close_bucket(self, keep: Callable[[Any], Any]) -> None:
        """A weight that travels whole may still be the model's own memory: ``keep`` copies it, or the engines take it first."""
        self._buckets.append(keep(tuple(self._bucket)))
        self._bucket = []


class LastReceived:
    """An engine's copy of the weights that it took last."""

    def __init__(self) -> None:
        self._weights: dict[str, Array] = {}
        self._checksum: str | None = None

    def holds(self, delta: Delta | None) -> bool:
        """Whether ``delta`` applies to these weights."""
        return delta is not None and delta.base == self._checksum

    def remember(self, buckets: Iterable[Any], to_array: Callable[[Any], Array]) -> Iterator[Any]:
        """Copy all weights of an update while they pass; they count once the update is :meth:`adopted`."""
        self._checksum, self._weights = None, {}
        for bucket in buckets:
            for name, weight in bucket:
                self._weights[name] = to_array(weight).copy()
            yield bucket

    def rebuilt(self, delta: Delta) -> Iterator[list[tuple[str, Array]]]:
        """Whole weights after ``delta``, bucket by bucket; they count once the update is :meth:`adopted`."""
        self._checksum = None
        for bucket in delta.buckets:
            for change in bucket:
                if change.name not in self._weights:
                    raise WireError(f"weight {change.name!r} changed, but the version before did not have it")
                apply_change(change, self._weights[change.name])
            yield [(change.name, self._weights[change.name]) for change in bucket]

    def adopted(self, checksum: str) -> None:
        """The weights that passed last are a whole publication with this checksum."""
        self._checksum = checksum
