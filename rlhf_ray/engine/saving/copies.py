"""Copies of a training state in host memory.

Invariants: a copy equals the state as it was, bit for bit and container by container, and shares no memory with it. A tensor
that is in a state twice, such as a tied weight, is copied once. Of a tensor that is a view only what it shows is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Copies:
    """Copies one state after the other, each as :func:`copied_state` does."""

    def __init__(self) -> None:
        self.pinned_bytes = 0
        """Of what was copied, what lies in pinned memory, which torch does not give back."""

    def __call__(self, state: Any) -> Any:
        copied = copied_state(state)
        self.pinned_bytes += sum(tensor.nbytes for tensor in _tensors(copied) if tensor.is_pinned())
        return copied


def copied_state(state: Any) -> Any:
    """A copy of a state of nested dicts, lists and tuples, and whatever ``copy.deepcopy`` knows.

    Tensors of a GPU are copied into pinned memory of the host. That has not run on a GPU yet.
    """
    memo: dict[int, Any] = {}
    _copy_tensors(state, memo, {})
    if any(tensor.is_cuda for tensor in _tensors(state)):
        torch.cuda.synchronize()  # the copies were only asked for
    return copy.deepcopy(state, memo)


def _copy_tensors(state: Any, memo: dict[int, Any], copies: dict[tuple[Any, ...], Tensor]) -> None:
    """Copy every tensor in ``state``, and note the copies in ``memo`` as ``copy.deepcopy`` looks for them."""
    for tensor in _tensors(state):
        if id(tensor) in memo:
            continue
        place = (
            tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, type(tensor)
        )  # fmt: skip
        if place not in copies:
            copies[place] = _on_host(tensor)
        memo[id(tensor)] = copies[place]


def _tensors(state: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    found, left = [], [state]
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple):
            left.extend(item)
    return found


def _on_host(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    held = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    held.copy_(values, non_blocking=True)
    return nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held
