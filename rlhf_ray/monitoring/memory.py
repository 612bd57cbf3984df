"""Memory of a tree of processes and of the object store that they share.

Always true: ``pss_gb`` is the sum over all processes of their proportional set size, in which a page shared by several
counts once; ``object_store_gb`` is what their open files in ``/dev/shm`` hold, each counted once. Pages of the object
store that a process has mapped are in both, so the total is an upper bound.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

GB = 1e9
SHARED_MEMORY = "/dev/shm/"


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
    """Memory of the processes ``roots`` and of all that descend from them, now."""
    processes = descendants(roots)
    pss = sum(map(_pss_bytes, processes))
    store: dict[tuple[int, int], int] = {}
    for process in processes:
        store |= _shared_files(process)
    return MemoryUse(pss / GB, sum(store.values()) / GB, len(processes))


def descendants(roots: Iterable[int]) -> list[int]:
    """The process ids ``roots``, as far as they live, and all that descend from them."""
    children: dict[int, list[int]] = {}
    alive = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        alive.add(int(path.name))
        children.setdefault(int(fields[1]), []).append(int(path.name))
    found: set[int] = set()
    open_ends = [root for root in roots if root in alive]
    while open_ends:
        process = open_ends.pop()
        if process not in found:
            found.add(process)
            open_ends += children.get(process, [])
    return sorted(found)


def _pss_bytes(process: int) -> int:
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it ended while we looked
        pass
    return 0


def _shared_files(process: int) -> dict[tuple[int, int], int]:
    """Bytes held by each open file in shared memory, by device and inode; files without a name count too."""
    try:
        descriptors = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:  # it ended while we looked
        return {}
    files = {}
    for descriptor in descriptors:
        try:
            if os.readlink(descriptor).startswith(SHARED_MEMORY):
                status = os.stat(descriptor)
                files[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:  # it was closed while we looked
            continue
    return files


class MemorySampler:
    """A thread that measures a tree of processes each second, until :meth:`stop` or the end of a ``with`` block."""

    def __init__(self, roots: Iterable[int] = (), interval_s: float = 1.0) -> None:
        self._roots = tuple(roots) or (os.getpid(),)
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._begin = time.monotonic()
        self.history: list[tuple[float, MemoryUse]] = []

    def start(self) -> MemorySampler:
        """Begin; the first measurement is taken at once."""
        self._begin = time.monotonic()
        self._measure()
        self._thread.start()
        return self

    def stop(self) -> MemoryUse:
        """End, and return the moment of the largest total."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
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
        while not self._ended.wait(self._interval_s):
            self._measure()

    def _measure(self) -> None:
        self.history.append((time.monotonic() - self._begin, memory_use(self._roots)))
