"""What a computation costs, counted as its operators are called: passes over large tensors, and bytes held at once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = ("t", "detach", "slice", "view", "unsqueeze", "select", "transpose", "expand", "alias", "empty", "_unsafe_view")
"""Operators that read and write no numbers."""


class Passes(TorchDispatchMode):
    """Counts the operators that read or write a tensor of ``numbers`` elements, by name, within its context."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        touched = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        if name not in VIEWS and any(tensor.numel() == self.numbers for tensor in touched):
            self.counts[name] += 1
        return out


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within its context and alive at once; ``peak`` is the most.

    ``inputs`` were there before, and are not counted. What an operator allocates and frees inside is not seen.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in inputs)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: int) -> None:
        self.live -= size
