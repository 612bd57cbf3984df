"""Measure the memory of a tree of processes and of the shared memory that they hold open.

Invariants: ``pss_gb`` is the sum of the proportional set sizes (PSS) of all processes, so that a page which several
processes share counts once. ``object_store_gb`` is the size of the files in ``/dev/shm`` that the processes hold open,
each counted once; Ray's object store lies there. A page of the object store that a process has mapped is in both
figures, so the total is an upper bound.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

GB = 1e9
JOIN_S = 10.0
"""How long the last measurement may take: reading the page tables of a process waits for what maps memory in it."""
SHARED_MEMORY = "/dev/shm/"
BYTES_PER_BLOCK = 512
"""The unit of ``st_blocks``, whatever the file system's own block size is (POSIX ``sys/stat.h``)."""


@dataclass(frozen=True)
class MemoryUse:
    """Memory at one moment, in GB (1e9 bytes)."""

    pss_gb: float = 0.0
    object_store_gb: float = 0.0
    processes: int = 0

    @property
    def total_gb(self) -> float:
        """Processes and object store together."""
        return self.pss_gb + self.object_store_gb


def memory_use(roots: Iterable[int]) -> MemoryUse:
    """Measure the memory that the processes ``roots`` and all their descendants use now.

    ``roots`` are process ids. A process that has ended, or ends meanwhile, counts as nothing.
    """
    processes = process_tree(roots)
    shared_files: dict[tuple[int, int], int] = {}
    for process in processes:
        shared_files |= _shared_files(process.pid)
    pss_bytes = sum(map(_pss_bytes, processes))
    return MemoryUse(pss_bytes / GB, sum(shared_files.values()) / GB, len(processes))


def process_tree(roots: Iterable[int]) -> list[psutil.Process]:
    """The processes with the ids ``roots`` that are alive and all their descendants, each once."""
    tree: dict[int, psutil.Process] = {}
    for root in roots:
        if root in tree:  # a descendant of an earlier root: its own descendants are there too
            continue
        try:
            process = psutil.Process(root)
            tree |= {member.pid: member for member in (process, *process.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    return list(tree.values())


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or belongs to another user
        return 0


def _shared_files(process_id: int) -> dict[tuple[int, int], int]:
    """Bytes of each shared-memory file that a process holds open, by device and inode.

    Ray removes the name of its object store right after opening it. ``psutil.Process.open_files`` leaves such files
    out, so this reads ``/proc`` itself.
    """
    try:
        descriptors = list(Path(f"/proc/{process_id}/fd").iterdir())
    except OSError:  # it has ended, or belongs to another user
        return {}
    files = {}
    for descriptor in descriptors:
        try:
            if os.readlink(descriptor).startswith(SHARED_MEMORY):
                status = os.stat(descriptor)
                files[status.st_dev, status.st_ino] = status.st_blocks * BYTES_PER_BLOCK
        except OSError:  # it was closed meanwhile
            continue
    return files


class MemorySampler:
    """A thread that measures a tree of processes once an interval, from :meth:`start` to :meth:`stop`.

    ``roots`` are process ids; without any, the tree starts at this process. ``history`` holds the measurements with the
    seconds since the start. As a context manager it starts on entry and stops on exit.
    """

    def __init__(self, roots: Iterable[int] = (), interval_s: float = 1.0) -> None:
        self._roots = tuple(roots) or (os.getpid(),)
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._started_at = time.monotonic()
        self.history: list[tuple[float, MemoryUse]] = []

    def start(self) -> MemorySampler:
        """Take the first measurement and start the thread."""
        self._started_at = time.monotonic()
        self._measure()
        self._thread.start()
        return self

    def stop(self) -> MemoryUse:
        """End the thread and return the measurement with the largest total."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        return self.peak

    @property
    def latest(self) -> MemoryUse:
        """The last measurement."""
        return self.history[-1][1] if self.history else MemoryUse()

    @property
    def peak(self) -> MemoryUse:
        """The measurement with the largest total so far."""
        return max((use for _, use in self.history), key=lambda use: use.total_gb, default=MemoryUse())

    def __enter__(self) -> MemorySampler:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._measure()

    def _measure(self) -> None:
        self.history.append((time.monotonic() - self._started_at, memory_use(self._roots)))
