"""Packs side by side on CPU: as many at once as there are threads, a thread for each, through one set of weights.

Always true: the results are those of the packs one after another, in their order; no weight is copied; outside of a pass the
threads of the process are what they were.

The threads of one operation wait for each other at its end, thousands of times a pass. Packs that run side by side, one
thread each, do not.
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


class Streams:
    """Threads that each run whole packs, without gradients, through a module."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._module: nn.Module | None = None
        self._free: SimpleQueue[nn.Module] = SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, "pack", initializer=_compute_alone)
        started = Barrier(threads)
        list(self._pool.map(lambda _: started.wait(), range(threads)))
        torch.set_num_threads(threads)  # what one of them sets is also what any later thread of the process begins with

    def map(self, module: nn.Module, forward: Forward, packs: Iterable[Packed]) -> list[Tensor]:
        """``forward(module, packed)`` of every pack, in their order; one call at a time."""
        if self._module is not module:
            self._module, self._free = module, SimpleQueue()
            for _ in range(self.threads):
                self._free.put(same_weights(module))
        return list(self._pool.map(lambda packed: self._run(forward, packed), packs))

    @torch.inference_mode()
    def _run(self, forward: Forward, packed: Packed) -> Tensor:
        module = self._free.get()
        try:
            return forward(module, packed)
        finally:
            self._free.put(module)


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread takes the number of the process at its first question, whatever it was told before
    torch.set_num_threads(1)


def same_weights(module: nn.Module) -> nn.Module:
    """Another module with the parameters and buffers of ``module`` itself: a pass may change its modules for a while."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
