"""A batch of token sequences of any length, laid end to end, with columns of numbers about tokens and sequences.

Invariants:

- There is no padding: the tokens of sequence ``i`` are ``offsets[i]:offsets[i + 1]``.
- A number about a token stands at that token. The first token of a sequence is never an action.
- A batch never changes, because its memory may be shared and read-only: every method returns a new one.
- A batch crosses processes as plain contiguous arrays, without a copy where the transport has out-of-band buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.errors import MissingColumnError
from rlhf_ray.trajectories.column_checks import (
    BatchError,
    as_tensor,
    check_column,
    check_offsets,
    describe,
    make_column,
)
from rlhf_ray.trajectories.columns import KEPT, PER_SEQUENCE, PER_TOKEN, ROUTED, FinishReason
from rlhf_ray.trajectories.kept_sets import KeptSets

__all__ = [
    "PER_SEQUENCE",
    "PER_TOKEN",
    "BatchError",
    "FinishReason",
    "TrajectoryBatch",
    "is_over_tokens",
    "scatter_sequences",
    "scatter_tokens",
]

Array = NDArray[Any]

# Arrays from Ray's object store are read-only, and columns are never written, so torch's warning about it is no news.
# The filter is set once: a context around each call would restore a process-wide list and race between threads.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on a device. A GPU is not waited for: what it does later sees the numbers that are there now.

    CUDA copies from pinned memory only without waiting. That has not run on a GPU yet.
    """
    target = torch.device(device)
    if target.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(target, non_blocking=target.type != "cpu")


@dataclass(frozen=True, eq=False, repr=False)
class TrajectoryBatch:
    """Sequences and their columns: ``offsets`` (sequences + 1,) cuts the tokens into sequences.

    ``tensors`` holds the columns by name, each over tokens or over sequences (:mod:`rlhf_ray.trajectories.columns`). Raises
    :class:`BatchError` where a column has another shape, dtype or device than it must.
    """

    offsets: Int64[Tensor, "cuts"]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_offsets(self.offsets)
        if "token_ids" not in self.tensors:
            raise BatchError("a batch needs the column 'token_ids'")
        if "offsets" in self.tensors:
            raise BatchError("a column cannot be named 'offsets': the offsets of the batch have that name")
        tokens = self.tensors["token_ids"].numel()
        if self.offsets.device.type == "cpu" and int(self.offsets[-1]) != tokens:
            raise BatchError(f"offsets end at {int(self.offsets[-1])}, but column 'token_ids' has {tokens} tokens")
        sets = {"kept_sizes", *KEPT}
        missing = sets - self.tensors.keys()
        if missing and missing != sets:
            raise BatchError(f"the columns of kept sets come together; missing: {_names(sorted(missing))}")
        if not missing and self.offsets.device.type == "cpu":
            words = int(self.tensors["kept_sizes"].abs().sum())
        else:  # on a device the batch was checked before, and reading values there would wait for it
            words = len(self.tensors.get("kept_words", ()))
        for name, column in self.tensors.items():
            check_column(name, column, self.offsets, tokens, words)
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    # Making

    @classmethod
    def from_sequences(
        cls, token_ids: Sequence[Sequence[int] | Tensor], *, action_mask: Any = None, **columns: Any
    ) -> TrajectoryBatch:
        """Make a batch of sequences; a column over tokens is one list per sequence, or one flat tensor."""
        lengths = [len(tokens) for tokens in token_ids]
        offsets = _make_offsets(torch.tensor(lengths, dtype=torch.int64))
        mask = {} if action_mask is None else {"action_mask": action_mask}
        numbers = {"token_ids": token_ids, **mask, **columns}
        return cls(offsets, {name: make_column(name, column, lengths) for name, column in numbers.items()})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> TrajectoryBatch:
        """Make a batch from the arrays of :meth:`to_arrays`, which may be read-only; it shares their memory."""
        if "offsets" not in arrays:
            raise BatchError(f"arrays of a batch need 'offsets'; there is: {_names(arrays)}")
        tensors = {name: as_tensor(name, array) for name, array in arrays.items()}
        return cls(tensors.pop("offsets"), tensors)

    def to_arrays(self) -> dict[str, Array]:
        """Return ``offsets`` and every column as contiguous arrays on CPU, which share the batch's memory if it is there."""
        tensors = {"offsets": self.offsets, **self.tensors}
        return {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return TrajectoryBatch.from_arrays, (self.to_arrays(),)

    @staticmethod
    def concatenate(batches: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
        """Put batches one after another; all must have the same columns. Those without sequences are left out."""
        if not batches:
            raise BatchError("there is nothing to concatenate: give one batch or more")
        batches = [batch for batch in batches if len(batch)] or batches[:1]
        first = batches[0]
        for position, batch in enumerate(batches):
            if set(batch.columns) != set(first.columns):
                raise BatchError(_column_difference(position, first, batch))
        lengths = torch.cat([batch.lengths for batch in batches])
        names = first.columns
        return TrajectoryBatch(_make_offsets(lengths), {name: _join(name, batches) for name in names})

    # Reading

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self.tensors["token_ids"])

    @property
    def lengths(self) -> Int64[Tensor, "sequences"]:
        """Number of tokens of each sequence."""
        return self.offsets.diff()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self.tensors)

    @property
    def device(self) -> torch.device:
        """Where every tensor of the batch is."""
        return self.offsets.device

    @property
    def kept(self) -> KeptSets | None:
        """The set among which each token was sampled; None where nothing was cut."""
        return KeptSets(self["kept_sizes"], self["kept_words"]) if "kept_words" in self else None

    def without_kept(self) -> TrajectoryBatch:
        """Return a batch without the sets among which tokens were sampled."""
        return self if self.kept is None else self.without("kept_sizes", *KEPT)

    def without_routed(self) -> TrajectoryBatch:
        """Return a batch without the experts that engines sent tokens to."""
        return self.without(ROUTED) if ROUTED in self else self

    @property
    def sequence_ids(self) -> Int64[Tensor, "tokens"]:
        """The row of the sequence that each token belongs to."""
        rows = torch.arange(len(self), device=self.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=self.num_tokens)

    @property
    def position_ids(self) -> Int64[Tensor, "tokens"]:
        """The position of each token in its sequence, counted from 0."""
        return _ragged_ranges(torch.zeros_like(self.offsets[:-1]), self.lengths, self.num_tokens)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.require(name)
        return self.tensors[name]

    def require(self, *names: str) -> None:
        """Raise :class:`MissingColumnError`, which names every column that is missing."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise MissingColumnError(f"the batch lacks {_names(missing)}; it has: {_names(self.columns)}")

    def __repr__(self) -> str:
        return f"TrajectoryBatch({len(self)} sequences, {self.num_tokens} tokens; {', '.join(self.columns)})"

    # Deriving

    def with_columns(self, **columns: Any) -> TrajectoryBatch:
        """Return a batch with these columns added or replaced; lists are allowed, as in :meth:`from_sequences`."""
        lengths = self.lengths.tolist() if not all(isinstance(column, Tensor) for column in columns.values()) else ()
        tensors = {name: make_column(name, numbers, lengths) for name, numbers in columns.items()}
        return TrajectoryBatch(self.offsets, {**self.tensors, **tensors})

    def without(self, *names: str) -> TrajectoryBatch:
        """Return a batch without these columns, which it must have."""
        self.require(*names)
        return TrajectoryBatch(self.offsets, {name: self.tensors[name] for name in self.columns if name not in names})

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """Return the batch on a device."""
        tensors = {name: send(column, device) for name, column in self.tensors.items()}
        return TrajectoryBatch(send(self.offsets, device), tensors)

    def select(self, indices: Sequence[int] | Tensor) -> TrajectoryBatch:
        """Return the sequences with these indices, in this order.

        Neighbours in their own order share the memory of this batch. Raises :class:`BatchError` for an index that does not
        exist, and for a mask.
        """
        rows = self._rows(indices)
        if len(rows) and bool((rows.diff() == 1).all()):
            return self._neighbours(int(rows[0]), int(rows[-1]) + 1)
        rows = rows.to(self.device)
        tokens = self._token_places(rows)
        tensors = {
            name: column[tokens if is_over_tokens(name) else rows]
            for name, column in self.tensors.items()
            if name not in KEPT
        }
        return TrajectoryBatch(_make_offsets(self.lengths[rows]), {**tensors, **self._kept_words(tokens)})

    def _neighbours(self, start: int, stop: int) -> TrajectoryBatch:
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        tensors = {
            name: column[first:last] if is_over_tokens(name) else column[start:stop]
            for name, column in self.tensors.items()
            if name not in KEPT
        }
        return TrajectoryBatch(
            self.offsets[start : stop + 1] - first, {**tensors, **self._kept_words(slice(first, last))}
        )

    def _kept_words(self, tokens: Tensor | slice) -> dict[str, Tensor]:
        return {} if self.kept is None else {"kept_words": self.kept.select(tokens).words}

    def _rows(self, indices: Sequence[int] | Tensor) -> Int64[Tensor, "selected"]:
        rows = torch.as_tensor(indices, device="cpu") if len(indices) else torch.empty(0, dtype=torch.int64)
        if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):  # a mask is not a list of indices
            raise BatchError(f"sequences are chosen by a list of their indices, not by {describe(rows)}")
        rows = rows.long()
        wrong = rows[(rows < 0) | (rows >= len(self))]
        if len(wrong):
            raise BatchError(f"sequence {int(wrong[0])} is not in the batch, which has {len(self)} sequences from 0")
        return rows

    def _token_places(self, rows: Int64[Tensor, "selected"]) -> Int64[Tensor, "selected_tokens"]:
        lengths = self.lengths[rows]
        return _ragged_ranges(self.offsets[:-1][rows], lengths, int(lengths.sum()))


def is_over_tokens(name: str) -> bool:
    """Whether a column has one number, or one matrix, for each token."""
    return name in PER_TOKEN or name == ROUTED


def scatter_tokens(
    parts: Sequence[tuple[Sequence[int], Shaped[Tensor, "_"]]], batch: TrajectoryBatch
) -> Shaped[Tensor, "tokens"]:
    """Put the per-token results of micro-batches at the tokens of the batch that they are about.

    A part holds the indices of the sequences of one micro-batch and the result over their tokens, in that order. Every
    sequence must be in exactly one part. A part without sequences comes from a dummy, and its result is dropped. Raises
    :class:`BatchError` where a sequence is missing, comes twice, or has a result of another size or dtype.
    """
    rows, values = _gather_parts(parts, batch, batch.lengths)
    out = values.new_empty(batch.num_tokens)
    out[batch._token_places(rows)] = values
    return out


def scatter_sequences(
    parts: Sequence[tuple[Sequence[int], Shaped[Tensor, "_"]]], batch: TrajectoryBatch
) -> Shaped[Tensor, "sequences"]:
    """Put the per-sequence results of micro-batches in the order of the batch, by the rules of :func:`scatter_tokens`."""
    rows, values = _gather_parts(parts, batch, torch.ones_like(batch.lengths))
    out = values.new_empty(len(batch))
    out[rows] = values
    return out


def _gather_parts(
    parts: Sequence[tuple[Sequence[int], Tensor]], batch: TrajectoryBatch, sizes: Int64[Tensor, "sequences"]
) -> tuple[Int64[Tensor, "sequences"], Tensor]:
    """Check the parts and join them: the sequences in the order in which they came, and their results."""
    real = [(batch._rows(indices), values) for indices, values in parts if len(indices)]
    for position, (rows, values) in enumerate(real):
        size = int(sizes[rows].sum())
        if tuple(values.shape) != (size,):
            what = f"part {position} (sequences {_some(rows.tolist())})"
            raise BatchError(f"{what} must have shape ({size},), not {tuple(values.shape)}")
        if values.dtype != real[0][1].dtype:
            raise BatchError(f"part {position} is {values.dtype}, but the first part is {real[0][1].dtype}")
    joined = torch.cat([rows for rows, _ in real]) if real else torch.empty(0, dtype=torch.int64)
    _check_once(torch.bincount(joined, minlength=len(batch)))
    values = torch.cat([values.to(batch.device) for _, values in real]) if real else torch.empty(0)
    return joined.to(batch.device), values


def _check_once(counts: Int64[Tensor, "sequences"]) -> None:
    """Refuse sequences that come never or more than once."""
    masks = {"missing": counts == 0, "given more than once": counts > 1}
    faults = [f"{fault}: {_some(mask.nonzero()[:, 0].tolist())}" for fault, mask in masks.items() if mask.any()]
    if faults:
        raise BatchError(f"the parts must hold every sequence once; {'; '.join(faults)}")


def _make_offsets(lengths: Int64[Tensor, "sequences"]) -> Int64[Tensor, "sequences+1"]:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ragged_ranges(
    starts: Int64[Tensor, "sequences"], lengths: Int64[Tensor, "sequences"], total: int
) -> Int64[Tensor, "tokens"]:
    """Lay the ranges ``starts[i] .. starts[i] + lengths[i]`` end to end."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths, output_size=total) + torch.arange(total, device=starts.device)


def _join(name: str, batches: Sequence[TrajectoryBatch]) -> Tensor:
    columns = [batch[name] for batch in batches]
    for position, column in enumerate(columns):
        here, there = ((one.dtype, *one.shape[1:], one.device) for one in (column, columns[0]))
        if here != there:
            raise BatchError(f"column {name!r} is {there} in batch 0, but {here} in batch {position}")
    return torch.cat(columns)


def _column_difference(position: int, first: TrajectoryBatch, other: TrajectoryBatch) -> str:
    only_first = [name for name in first.columns if name not in other]
    only_other = [name for name in other.columns if name not in first]
    return (
        f"batch {position} has other columns than batch 0: it lacks {_names(only_first)} "
        f"and has {_names(only_other)} besides"
    )


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _some(numbers: Sequence[int], limit: int = 8) -> str:
    first = ", ".join(map(str, numbers[:limit]))
    return first if len(numbers) <= limit else f"{first}, ... ({len(numbers)} in all)"
