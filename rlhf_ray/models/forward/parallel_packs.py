"""Run packs in parallel on CPU: one thread for each pack, all through one set of weights.

Invariants: the results are those of running one pack after another, in the same order. No weight is copied. Between calls
the process has as many threads for an operation as before.

When many threads share one operation, they wait for each other at its end, thousands of times in a pass. Threads that each
run a whole pack do not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Barrier

import torch
from torch import Tensor, nn

from rlhf_ray.trajectories.packing import Packed

Forward = Callable[[nn.Module, Packed], Tensor]


class ParallelPacks:
    """A pool of threads that each run whole packs through a module, without gradients."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._module: nn.Module | None = None
        self._free: SimpleQueue[nn.Module] = SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, "pack", initializer=_compute_alone)
        started = Barrier(threads)
        list(self._pool.map(lambda _: started.wait(), range(threads)))
        # What a pool thread sets for itself also becomes the default of every later thread of the process: set it back.
        torch.set_num_threads(threads)

    def map(self, module: nn.Module, forward: Forward, packs: Iterable[Packed]) -> list[Tensor]:
        """Return ``forward(module, packed)`` for every pack, in order. Not to be called from two threads at a time."""
        if self._module is not module:
            self._module, self._free = module, SimpleQueue()
            for _ in range(self.threads):
                self._free.put(copy_sharing_weights(module))
        return list(self._pool.map(lambda packed: self._run(forward, packed), packs))

    @torch.inference_mode()
    def _run(self, forward: Forward, packed: Packed) -> Tensor:
        module = self._free.get()
        try:
            return forward(module, packed)
        finally:
            self._free.put(module)


def _compute_alone() -> None:
    torch.get_num_threads()  # the first query in a thread sets its count to that of the process: so query before setting
    torch.set_num_threads(1)


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """Copy the tree of modules, in evaluation mode, but share every parameter and buffer.

    A pass may patch modules for a while, so each thread needs a tree of its own.
    """
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
