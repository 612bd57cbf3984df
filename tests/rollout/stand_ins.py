"""What stands in for CUDA in tests of vLLM's transfer engines on a CPU: gloo for NCCL, shared objects for CUDA's IPC.

Everything else is vLLM's own code: what it sends and in which order, how it packs, what it announces.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, packed_tensor

LIMIT = timedelta(seconds=60)


class GlooGroup:
    """A group of processes that broadcasts, as vLLM's ``PyNcclCommunicator`` does."""

    def __init__(self, master_address: str, master_port: int, rank: int, world_size: int, device: Any) -> None:
        store = dist.TCPStore(master_address, master_port, world_size, rank == 0, LIMIT)
        self._group = dist.ProcessGroupGloo(store, rank, world_size, LIMIT)
        self.broadcasts: list[int] = []

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        self.broadcasts.append(tensor.nbytes)
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        del self._group


class Stream:
    """Work on a CPU is done when it is asked for."""

    def synchronize(self) -> None:
        pass


class CudaIsCpu(TorchFunctionMode):
    """Makes tensors on the CPU where they are asked for on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def on_cpu() -> ExitStack:
    """Let vLLM's transfer engines run on the CPU until the result is closed."""
    stack = ExitStack()
    exported: dict[int, Tensor] = {}

    def export(tensor: Tensor) -> tuple[None, tuple[Any, ...]]:
        exported[id(tensor)] = tensor
        return None, (id(tensor), 1, 2, 3, 4, 5, 0)

    for target, name, value in (
        (nccl_common, "stateless_init_process_group", GlooGroup),
        (packed_tensor, "_get_streams", lambda device, count: [Stream()] * count),
        (packed_tensor, "reduce_tensor", export),
        (torch.multiprocessing.reductions, "rebuild_cuda_tensor", lambda identity, *rest: exported[identity]),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="the-gpu")),
        (torch.cuda, "current_stream", Stream),
        (torch.cuda, "ipc_collect", lambda: None),
    ):
        stack.enter_context(patch.object(target, name, value))
    stack.enter_context(CudaIsCpu())
    assert ipc_engine.packed_ipc_producer is packed_tensor.packed_ipc_producer
    return stack
