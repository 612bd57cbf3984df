"""Check tensors before they become columns of a trajectory batch.

Invariants:

- A column that :mod:`rlhf_ray.trajectories.columns` lists with a dtype has exactly that dtype; any other column holds one
  number per sequence.
- A number never changes on its way into a column, except that floats are rounded to float32: 2.5 for an integer column,
  or an integer that does not fit, is refused.
- No column carries a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.trajectories.columns import FREE_DTYPES, KEPT, PER_SEQUENCE, PER_TOKEN, ROUTED, ROUTED_DTYPES


class BatchError(RlhfRayError, ValueError):
    """A trajectory batch, or a tensor meant for one, breaks a rule; the message names the column."""


def check_offsets(offsets: Tensor) -> None:
    """Raise :class:`BatchError` for offsets that do not start at 0 or that cut an empty sequence."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or len(offsets) == 0:
        raise BatchError(f"offsets must be an int64 tensor of shape (sequences + 1,), not {describe(offsets)}")
    # A batch reaches a device only through `to` and was checked before; reading values there would wait for the device.
    if offsets.device.type != "cpu":
        return
    if offsets[0] != 0:
        raise BatchError(f"offsets must start at 0, not at {int(offsets[0])}")
    empty = (offsets.diff() <= 0).nonzero()
    if len(empty):
        row = int(empty[0])
        raise BatchError(
            f"sequence {row} has {int(offsets[row + 1] - offsets[row])} tokens (offsets {int(offsets[row])} to "
            f"{int(offsets[row + 1])}): every sequence needs at least one"
        )


def check_column(name: str, column: Tensor, offsets: Int64[Tensor, "cuts"], tokens: int, words: int = 0) -> None:
    """Raise :class:`BatchError` for a column whose shape, dtype or device is wrong, or that carries a gradient.

    ``words`` is the size of columns over kept sets.
    """
    size, what = (tokens, "tokens") if name in PER_TOKEN else (len(offsets) - 1, "sequences")
    if name in KEPT:
        size, what = words, "words in kept_sizes"
    if name == ROUTED:
        _check_routed(column, tokens)
    elif tuple(column.shape) != (size,):
        shape = tuple(column.shape)
        raise BatchError(f"column {name!r} has shape {shape}, but the batch has {size} {what}: it must be ({size},)")
    wanted = PER_TOKEN.get(name) or PER_SEQUENCE.get(name) or KEPT.get(name)
    if wanted is not None and column.dtype != wanted:
        raise BatchError(f"column {name!r} must be {_short(wanted)}, not {_short(column.dtype)}: convert it first")
    if wanted is None and name != ROUTED and column.dtype not in FREE_DTYPES:
        allowed = ", ".join(_short(dtype) for dtype in FREE_DTYPES)
        raise BatchError(f"free column {name!r} must be one of {allowed}, not {_short(column.dtype)}: convert it first")
    if column.device != offsets.device:
        raise BatchError(f"column {name!r} is on {column.device}, but the batch is on {offsets.device}")
    if column.requires_grad:
        raise BatchError(f"column {name!r} carries a gradient: a batch holds numbers, detach() it first")
    if name == "action_mask":
        _check_first_tokens(column, offsets)


def _check_routed(column: Tensor, tokens: int) -> None:
    if column.dim() != 3 or len(column) != tokens or column.dtype not in ROUTED_DTYPES:
        allowed = " or ".join(_short(dtype) for dtype in ROUTED_DTYPES)
        raise BatchError(
            f"column {ROUTED!r} must be {allowed} of shape ({tokens}, routers, experts of a token), not {describe(column)}"
        )


def _check_first_tokens(action_mask: Tensor, offsets: Tensor) -> None:
    if offsets.device.type != "cpu" or len(offsets) == 1:
        return
    wrong = action_mask[offsets[:-1]].nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise BatchError(
            f"action_mask marks the first token of sequence {row}: nothing stands before it to sample from"
        )


def make_column(name: str, numbers: Any, lengths: Sequence[int]) -> Tensor:
    """Make a column from a tensor or an array, which are kept as they are, or from lists of numbers.

    A column over tokens is a list with one entry per sequence, each as long as its sequence. Raises :class:`BatchError` where
    sizes differ or a number does not fit.
    """
    if isinstance(numbers, Tensor):
        return numbers
    if isinstance(numbers, numpy.ndarray):
        return as_tensor(name, numbers)
    if name not in PER_TOKEN:
        return _exactly(name, numbers, PER_SEQUENCE.get(name) or KEPT.get(name))
    if len(numbers) != len(lengths):
        raise BatchError(f"column {name!r} has {len(numbers)} sequences, but the batch has {len(lengths)}")
    pieces = [_exactly(name, piece, PER_TOKEN[name]) for piece in numbers]
    for row, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
        if tuple(piece.shape) != (length,):
            shape = tuple(piece.shape)
            raise BatchError(f"column {name!r} of sequence {row} has shape {shape}, but that has {length} tokens")
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=PER_TOKEN[name])


def as_tensor(name: str, array: NDArray[Any]) -> Tensor:
    """Share the memory of an array, which may be read-only: nothing in this project writes into a column."""
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise BatchError(f"column {name!r} cannot be a tensor: {error}") from error


def _exactly(name: str, numbers: Any, dtype: torch.dtype | None) -> Tensor:
    """Turn numbers into a tensor of the dtype; refuse a number that an integer or a flag cannot hold exactly."""
    try:
        tensor = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(f"column {name!r} must be made of numbers: {error}") from error
    if dtype is None or tensor.dtype == dtype:
        return tensor
    column = tensor.to(dtype)
    if not dtype.is_floating_point and not torch.equal(column.to(torch.float64), tensor.to(torch.float64)):
        wrong = (column.to(torch.float64) != tensor.to(torch.float64)).nonzero()[0]
        number = tensor[tuple(wrong)].item()
        raise BatchError(f"column {name!r} is {_short(dtype)} and cannot hold {number!r}")
    return column


def describe(tensor: Tensor) -> str:
    """Name the dtype and the shape of a tensor, for a message."""
    return f"a tensor of {_short(tensor.dtype)} with shape {tuple(tensor.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
