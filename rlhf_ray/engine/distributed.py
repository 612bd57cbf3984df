"""The process group that the ranks of one role form, and decisions that they take together.

Invariants: every collective operation has a deadline, after which it raises instead of waiting. A decision taken here is the
same on every rank.
"""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhf_ray.errors import RlhfRayError


def init_process_group(
    rank: int, world_size: int, master_addr: str, master_port: int, *, local_rank: int = 0, timeout_s: float = 600.0
) -> None:
    """Join the group of ``world_size`` ranks that meets at ``master_addr:master_port``: over nccl on a GPU, else gloo.

    ``local_rank`` is the index of this rank's device among those it sees: 0 in a Ray actor, which sees only its own.
    ``timeout_s`` is the deadline of every collective operation, in seconds.
    """
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{master_addr}:{master_port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    _join_deepspeed(cuda)


def _join_deepspeed(cuda: bool) -> None:
    import deepspeed.ops
    from deepspeed.utils import set_log_level_from_string

    set_log_level_from_string("error")
    # DeepSpeed 0.19 calls two functions that torch 2.13 has renamed, and torch warns at the first call of each.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not cuda:
        # DeepSpeed would compile an all-reduce over shared memory, which only its inference engine uses. That takes up to
        # 90 seconds at first use, holds a lock that outlives a killed process, and leaves segments in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


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
