"""Measure the memory of trees of processes and of the shared memory that they hold open.

Invariants: ``pss_gb`` is the sum of the proportional set sizes (PSS) of all processes, so that a page which several
processes share counts once. ``object_store_gb`` is the size of the files in ``/dev/shm`` that the processes hold open,
each counted once; Ray's object store lies there. A page of the object store that a process has mapped is in both
figures, so the total is an upper bound. Of several trees, on one machine or on several, each process and each file counts once,
however many trees it is in.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from rlhf_ray.console import get_logger
from rlhf_ray.processes.clock import boot

GB = 1e9
JOIN_S = 10.0
"""How long the last measurement may take: reading the page tables of a process waits for what maps memory in it."""
WAIT_S, LAST_WAIT_S = 2.0, 30.0
"""How long other trees have to answer. The last time they get longer: no later answer can make up for one that is missing."""
SHARED_MEMORY = "/dev/shm/"
BYTES_PER_BLOCK = 512
"""The unit of ``st_blocks``, whatever the file system's own block size is (POSIX ``sys/stat.h``)."""


@dataclass(frozen=True)
class MemoryUse:
    """Memory at one moment, in GB (1e9 bytes)."""

    pss_gb: float = 0.0
    object_store_gb: float = 0.0
    processes: int = 0
    by_node: Mapping[str, float] = field(default_factory=dict)
    """The total of each node, by its host name."""

    @property
    def total_gb(self) -> float:
        """Processes and object store together."""
        return self.pss_gb + self.object_store_gb


@dataclass(frozen=True)
class TreeMemory:
    """What a tree of processes holds on its machine, in bytes, so that several trees can be counted together."""

    node: str
    """The host name."""
    machine: str
    """Tells kernels apart, and so files in shared memory."""
    namespace: str
    """Tells process ids apart: containers of one machine each count them anew."""
    pss: Mapping[int, int]
    """By process id."""
    shared: Mapping[tuple[int, int], int]
    """Of files in shared memory, by device and inode."""


Elsewhere = Callable[[float], Iterable[TreeMemory]]
"""What trees of other machines hold, asked with the seconds that they have to answer."""


def memory_use(roots: Iterable[int]) -> MemoryUse:
    """Measure the memory that the processes ``roots`` and all their descendants use now.

    ``roots`` are process ids. A process that has ended, or ends meanwhile, counts as nothing.
    """
    return together([tree_memory(roots)])


def tree_memory(roots: Iterable[int]) -> TreeMemory:
    """The same by process and by file."""
    processes = process_tree(roots)
    shared: dict[tuple[int, int], int] = {}
    for process in processes:
        shared |= _shared_files(process.pid)
    machine = boot()
    pss = {process.pid: _pss_bytes(process) for process in processes}
    return TreeMemory(socket.gethostname(), machine, f"{machine} {_namespace()}", pss, shared)


def together(trees: Iterable[TreeMemory]) -> MemoryUse:
    """What all trees hold; of what is in several of them, what the first says of it."""
    pss: dict[tuple[str, int], int] = {}
    shared: dict[tuple[str, int, int], int] = {}
    by_node: dict[str, int] = {}
    for tree in trees:
        processes = {(tree.namespace, pid): size for pid, size in tree.pss.items()}
        files = {(tree.machine, *file): size for file, size in tree.shared.items()}
        new = [size for key, size in processes.items() if key not in pss]
        new += [size for key, size in files.items() if key not in shared]
        pss, shared = processes | pss, files | shared
        if new:
            by_node[tree.node] = by_node.get(tree.node, 0) + sum(new)
    shares = {node: size / GB for node, size in by_node.items()}
    return MemoryUse(sum(pss.values()) / GB, sum(shared.values()) / GB, len(pss), shares)


def resident_bytes(process_ids: Iterable[int]) -> int:
    """The sum of the resident sets of processes, shared pages in each of them; cheap, unlike the proportional ones."""
    total = 0
    for process_id in process_ids:
        try:
            total += int(psutil.Process(process_id).memory_info().rss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


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

    ``roots`` are process ids; without any, the tree starts at this process. ``elsewhere`` says what other trees hold, and may
    wait for their answers as long as it is told (seconds); where it fails, they hold what they held before. ``history`` holds
    the measurements with the seconds since the start. As a context manager it starts on entry and stops on exit.
    """

    def __init__(
        self,
        roots: Iterable[int] = (),
        interval_s: float = 1.0,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._roots = tuple(roots) or (os.getpid(),)
        self._elsewhere = elsewhere
        self._others: list[TreeMemory] = []
        self._said = False
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._started_at = time.monotonic()
        self.history: list[tuple[float, MemoryUse]] = []

    def start(self) -> MemorySampler:
        """Take the first measurement and start the thread."""
        self._started_at = time.monotonic()
        self._measure(WAIT_S)
        self._thread.start()
        return self

    def stop(self) -> MemoryUse:
        """End the thread and return the measurement with the largest total."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        return self.peak

    def last(self) -> MemoryUse:
        """End the thread, measure once more, and return the peak: a run may end before its ranks have answered a first time.

        Where the thread does not end in time, another measurement would wait for the same, and nothing more is measured.
        """
        self.stop()
        if not self._thread.is_alive():
            self._measure(LAST_WAIT_S)
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
            self._measure(WAIT_S)

    def _measure(self, wait_s: float) -> None:
        try:
            self._others = [] if self._elsewhere is None else list(self._elsewhere(wait_s))
        except Exception as error:  # such as a Ray that goes down: what this machine holds is known all the same
            if not self._said:
                get_logger("memory").warning("the memory of other processes of the run is not known (%r)", error)
            self._said = True
        use = together([tree_memory(self._roots), *self._others])
        self.history.append((time.monotonic() - self._started_at, use))
