"""The worker processes of a vLLM engine with tensor parallelism: how weights reach them, which of them died, and what they must
not leave behind.

Invariants:

- The bytes of a bucket are copied once, however many workers read them; a tensor that was read stays valid for as long as it is
  held. vLLM's own way to its workers, the queue of ``collective_rpc``, would send every byte to each of them.
- An engine whose worker died says which one and of what.
- Once an engine has started, nothing of it has a name on this machine, so that it leaves no socket and no shared memory behind,
  however it ends. A bucket never has one.

vLLM 0.32 needs its sockets (in ``VLLM_RPC_BASE_PATH``), queues, locks and, on CPU, the memory through which workers add up
their parts of a layer by name only until every process has opened them, and removes the names at its end. A killed engine has
no such end, and Ray kills Python's resource tracker, which would do it, with the other children of an actor. vLLM has no
interface for that, so the names are taken from what its processes have mapped (``tests/e2e/test_tensor_parallel.py`` fails when
something stays behind). After the death of a worker vLLM says once that it misses one of them.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

SHARED_MEMORY = "/dev/shm/"
TRACKED = {"psm_": "shared_memory", "sem.mp-": "semaphore"}
"""What Python's resource tracker calls the kind of a name that begins so."""
PREFIXES = (*TRACKED, "vllm_dist_")
"""How the names begin under which vLLM's processes share memory: Python's two, and that of its workers on CPU."""
SOCKETS = "VLLM_RPC_BASE_PATH"
"""The variable that names the directory of vLLM's sockets."""
WARNINGS = "PYTHONWARNINGS"
ALIGNMENT = 64
"""Bytes at whose multiples a weight begins in a bucket, as with torch's own allocator."""


class WorkerProcesses:
    """The worker processes of the engine in this process, by rank; none where it computes here itself."""

    def __init__(self, processes: Sequence[BaseProcess] = ()) -> None:
        self.processes = list(processes)
        self._names: list[str] = []

    def death(self) -> str | None:
        """Which worker has ended, and how; none while all live. One that was killed comes before those that followed it."""
        ended = [(process.exitcode, rank) for rank, process in enumerate(self.processes) if not process.is_alive()]
        if not ended:
            return None
        code, rank = min(ended, key=lambda one: (one[0] in (None, 0, -signal.SIGTERM), one[1]))
        how = (
            f"died of {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
        )
        return f"tensor-parallel worker {rank} of {len(self.processes)} (process {self.processes[rank].pid}) {how}" + (
            ": see whether the node ran out of memory" if code == -signal.SIGKILL else ""
        )

    def forget_names(self, but: Set[str]) -> None:
        """Remove the names of what this process and the workers have mapped, except ``but``, as soon as all have opened it."""
        mapped = set().union(*(mapped_names(process.pid) for process in self.processes), mapped_names("self"))
        self._names = sorted(mapped - but)
        for name in self._names:
            Path(SHARED_MEMORY, name).unlink(missing_ok=True)
            if (tracked := _tracked(name)) is not None:
                resource_tracker.unregister(*tracked)

    def restore_names(self) -> None:
        """Make the names again, for nothing but that vLLM finds them when it removes them at its end."""
        for name in self._names:
            if (tracked := _tracked(name)) is not None:
                Path(SHARED_MEMORY, name).touch()
                resource_tracker.register(*tracked)


@contextmanager
def starting_workers() -> Iterator[WorkerProcesses]:
    """Start an engine inside the block; afterwards the workers that it started are known, and their names are gone."""
    workers, before, mapped = WorkerProcesses(), set(multiprocessing.active_children()), mapped_names("self")
    directory = tempfile.mkdtemp(prefix="vllm-")
    # vLLM probes deprecated names of torch while a worker imports it
    variables = {SOCKETS: directory, WARNINGS: os.environ.get(WARNINGS, "ignore::FutureWarning")}
    replaced = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield workers
        started = set(multiprocessing.active_children()) - before
        workers.processes = sorted(started, key=lambda process: int(process.name.rpartition("-")[2]))
        if workers.processes:
            workers.forget_names(mapped)
    finally:
        for name, value in replaced.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(directory, ignore_errors=True)


def stay_eager() -> None:
    """Compile nothing in this process. vLLM compiles two helpers of its sampler on first use: 2 to 30 s for kernels that the
    CPU gains nothing by.
    """
    torch.compiler.set_stance("force_eager")


def mapped_names(process: int | str | None) -> Set[str]:
    """The names in shared memory of what a process has mapped, as far as it is vLLM's.

    They are found by their inodes: a lock is mapped under a name that is gone at once, and has another.
    """
    lines = Path(f"/proc/{process}/maps").read_text("utf-8").splitlines()
    inodes = {int(line.split(maxsplit=5)[4]) for line in lines if SHARED_MEMORY in line}
    with os.scandir(SHARED_MEMORY) as entries:
        return {entry.name for entry in entries if entry.name.startswith(PREFIXES) and entry.inode() in inodes}


def _tracked(name: str) -> tuple[str, str] | None:
    """How the resource tracker knows a name: what it is called, and its kind; none for what it does not know."""
    kind = next((kind for prefix, kind in TRACKED.items() if name.startswith(prefix)), None)
    return None if kind is None else (f"/{name.removeprefix('sem.')}", kind)


# Buckets


@dataclass(frozen=True)
class Place:
    """Where one weight lies in a bucket: ``offset`` in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class SharedBucket:
    """A bucket that other processes of this machine can open for as long as :func:`shared` holds it."""

    path: str
    size: int
    places: tuple[Place, ...]

    def read(self) -> list[tuple[str, Tensor]]:
        """The weights, in their order, without a copy. What is written into them, only this process sees."""
        if not self.size:
            return [(place.name, torch.empty(place.shape, dtype=place.dtype)) for place in self.places]
        with open(self.path, "rb") as file:
            memory = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return [(place.name, _part(whole, place)) for place in self.places]


@contextmanager
def shared(weights: Sequence[tuple[str, Tensor]]) -> Iterator[SharedBucket]:
    """Copy ``weights``, which are on the CPU, to where other processes of this machine can open them inside the block."""
    places, size = [], 0
    for name, weight in weights:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        places.append(Place(name, weight.dtype, tuple(weight.shape), size))
        size += weight.nbytes
    descriptor = os.memfd_create("weights")
    try:
        os.ftruncate(descriptor, size)
        for place, (_, weight) in zip(places, weights, strict=True):
            _write(descriptor, weight, place.offset)
        yield SharedBucket(f"/proc/{os.getpid()}/fd/{descriptor}", size, tuple(places))
    finally:
        os.close(descriptor)


def _write(descriptor: int, weight: Tensor, offset: int) -> None:
    left = weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    while left:  # a call writes 2 GiB at most
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _part(whole: Tensor, place: Place) -> Tensor:
    end = place.offset + torch.Size(place.shape).numel() * place.dtype.itemsize
    return whole[place.offset : end].view(place.dtype).view(place.shape)
