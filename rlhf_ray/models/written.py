"""Compare a directory of weights that was just written with the model that it was written from.

Invariants: every parameter and persistent buffer of the model lies in the files under its name on disk, and nothing else does;
shape, dtype and bytes are those that were to be written. One tensor is in memory at a time besides the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.errors import IntegrityError
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.quantization import dequantized_like, four_bit_layers
from rlhf_ray.storage import storage_errors

NAMED = 4
"""How many tensors an error names."""


def names_to_write(model: PreTrainedModel | SequenceRegression) -> set[str]:
    """Return the names on disk of everything in the model's state, of which no data is touched.

    This goes by torch's own ``state_dict``, not by the walk over modules that gathers what is written.
    """
    scales = tuple(f"{name}.weight." for name in four_bit_layers(model))
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not (isinstance(tensor, nn.Parameter) and id(tensor) in seen) and not (scales and name.startswith(scales)):
            seen.add(id(tensor))
            named[name] = _without_data(tensor)
    return {name for name, _ in to_disk_names(model, named.items())}


def check_written(directory: Path, written: Mapping[str, Tensor], expected: Collection[str]) -> None:
    """Read the safetensors of ``directory`` and compare them with ``written``, whose names must be those ``expected``.

    Raises :class:`IntegrityError`, which names the tensors that are lacking, that are too many, or that differ.
    """
    read: set[str] = set()
    different: list[str] = []
    with storage_errors(directory, "read"):
        for name, tensor in _tensors(directory):
            read.add(name)
            if name in written and not _equal(tensor, written[name]):
                different.append(name)
    problems = (
        ("what the model holds is not in the files", sorted(set(expected) - read)),
        ("the files hold what the model does not", sorted(read - set(expected))),
        ("what is in the files is not what the model holds", different),
    )
    differences = "; ".join(f"{what}: {_list(names)}" for what, names in problems if names)
    if differences:
        raise IntegrityError(f"{directory} was written and read again, but {differences}. Do not use this directory")


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, file.get_tensor(name)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes; NaN equals itself."""
    other = other.detach().to("cpu")
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _without_data(tensor: Tensor) -> Tensor:
    like = dequantized_like(tensor)
    if like is not None:
        return like
    shape = tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.shape
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _list(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
