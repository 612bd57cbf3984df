"""How weights travel from the trainer's GPUs to the engines', chosen from where both were placed.

Invariants: the choice is a function of the placement alone. Weights go from GPU to GPU only where each of them can take part:
``ipc`` lets an engine read the memory of a trainer's rank on the same GPU, and ``nccl`` broadcasts from rank 0 to GPUs other
than its own, on any node. Everything else, a CPU on either side included, goes through Ray's object store.

Neither ``nccl`` nor ``ipc`` has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

Transport = Literal["object_store", "nccl", "ipc"]


def choose_transport(trainer: Sequence[str | None], engines: Sequence[Collection[str]]) -> Transport:
    """Choose from the GPU of each rank of the trainer (None: on a CPU) and the GPUs of each engine (none: on a CPU).

    A GPU is named so that no other one of the cluster has its name, such as by its UUID.
    """
    used = {gpu for engine in engines for gpu in engine}
    if None in trainer or not trainer or not engines or not all(engines):
        return "object_store"
    if used <= set(trainer):
        return "ipc"
    # The engines and rank 0 form one NCCL group, which takes a GPU once.
    twice = trainer[0] in used or len(used) < sum(map(len, engines))
    return "object_store" if twice else "nccl"
