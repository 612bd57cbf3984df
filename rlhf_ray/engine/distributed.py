"""The process group that the ranks of one role form, and decisions that they take together.

Invariants: every collective operation has the deadline that the group was joined with, after which it raises instead of
waiting; so have DeepSpeed's own once an engine is made. While a model loads in shards, those have torch's deadline. A decision
taken here is the same on every rank. Ranks meet at a port that one of them holds from the moment it is chosen, and that listens
at one address alone; a lone rank meets nobody and opens none.
"""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # documented, but not in its types

from rlhf_ray import environment
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.models.devices import CPU
from rlhf_ray.network import LOOPBACK, variables_at

TIMEOUT_S = 600.0
BACKLOG = 2048
_deadline = timedelta(seconds=TIMEOUT_S)
"""That of the process group, of which a process has one."""


def rendezvous(rank: int, world_size: int, address: str, port: int = 0, *, timeout_s: float = TIMEOUT_S) -> TCPStore:
    """Where a group of ranks meets: rank 0 holds it and listens at ``address`` only, the others join it.

    At port 0 rank 0 takes a free one, which is the ``port`` of what this returns. Raises ``OSError`` on rank 0 if ``address``
    is none of this machine's or the port is taken; on others ``DistNetworkError`` if rank 0 is out of reach for ``timeout_s``.
    """
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False}
    if rank != 0:
        return TCPStore(address, port, world_size, is_master=False, **options)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
        port = listener.getsockname()[1]
        # By itself the store would listen at every address of the machine. It closes the socket that it is given.
        return TCPStore(address, port, world_size, is_master=True, master_listen_fd=listener.detach(), **options)


def init_process_group(
    rank: int,
    world_size: int,
    store: dist.Store | None,
    *,
    device: torch.device = CPU,
    address: str = LOOPBACK,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Join the group of ``world_size`` ranks that meets at ``store`` (none for a lone rank): over nccl on a GPU, else gloo.

    ``device`` is what this rank computes on; DeepSpeed takes it too, once for the life of the process. ``address`` is this
    machine's among those of the group: it says which interface to use, unless the user has said so.
    ``timeout_s`` is the deadline of every collective operation, in seconds.
    """
    global _deadline
    _deadline = timedelta(seconds=timeout_s)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(device.index or 0)}
    os.environ["DS_ACCELERATOR"] = device.type
    environment.prepare(variables_at(address))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    store = HashStore() if store is None else store
    store.set_timeout(_deadline)  # ranks that set up a connection wait for one another there
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=_deadline
    )
    _join_deepspeed(device)


def _join_deepspeed(device: torch.device) -> None:
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import set_log_level_from_string

    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise RequestError(
            f"this rank was placed on {device.type}, but DeepSpeed was imported in this process for {chosen}, once for its "
            f"whole life: start a new process, with DS_ACCELERATOR={device.type} in its environment"
        )
    set_log_level_from_string("error")
    # DeepSpeed 0.19 calls two functions that torch 2.13 has renamed, and torch warns at the first call of each.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # DeepSpeed would compile an all-reduce over shared memory, which only its inference engine uses. That takes up to
        # 90 seconds at first use, holds a lock that outlives a killed process, and leaves segments in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def await_all() -> None:
    """Wait until every rank has come here. Collective.

    Before DeepSpeed makes a group of its own: until :func:`keep_deadline` that has torch's deadline, which is ten minutes with
    nccl, and ranks that load a model from a slow disk may come further apart.
    """
    dist.barrier()


def keep_deadline(group: dist.ProcessGroup) -> None:
    """Give a group that a library has made of all ranks the deadline of the process group."""
    group.set_timeout(_deadline)


def destroy_process_group() -> None:
    """Leave the group; a second call does nothing.

    DeepSpeed does it, so that it also forgets its own groups of these ranks.
    """
    if dist.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def require_process_group() -> None:
    """Raise if this process has not joined a group."""
    if not dist.is_initialized():
        raise RlhfRayError("no process group: call rlhf_ray.engine.init_process_group before making an Engine")


def all_agree(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true on every rank. Collective."""
    votes = torch.tensor([1 if flag else 0], dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())


def min_and_max(value: int, device: torch.device) -> tuple[int, int]:
    """Return the smallest and the largest ``value`` of all ranks. Collective."""
    # One reduction gives both, since the largest -value belongs to the smallest value.
    pair = torch.tensor([-value, value], dtype=torch.int64, device=device)
    dist.all_reduce(pair, op=dist.ReduceOp.MAX)
    return -int(pair[0]), int(pair[1])
