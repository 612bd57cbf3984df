"""The stacks of all threads of the processes of a run, also of one that hangs inside a library.

A process that calls :func:`offer` can be asked from outside: a signal makes ``faulthandler`` write its stacks into memory that
has a file descriptor (``memfd_create``), which whoever asks finds below ``/proc``. So nothing is left on any disk, and a
process that was killed leaves nothing at all.

Invariants: only a process that offers its stacks gets the signal, so none ends by it; asking takes at most ``WAIT_S`` for all
processes together; what a process cannot say itself is said of it: whether it is stopped, where in the kernel it waits, and the
last lines of its log.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil

SIGNAL = signal.SIGRTMIN + 12
"""A real-time signal, which neither Ray, torch, vLLM nor DeepSpeed use; schedulers and users send SIGUSR1 and SIGUSR2."""
MARK = "rlhf-ray-stacks:"
WAIT_S = 2.0
SETTLED_S = 0.05
"""How long after the last byte the stacks of a process count as whole."""
KEEP_S = 10.0
"""How long keeping the stacks may take."""
LOG_LINES, LOG_BYTES = 5, 4000
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

_file: TextIO | None = None


def offer(label: str) -> None:
    """Let this process be asked for its stacks from now on; ``label`` says what it is, such as ``rlhf/demo/policy/0``."""
    global _file
    file = os.fdopen(os.memfd_create(MARK + "".join(filter(str.isprintable, label))[:200]), "w")
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
    if _file is not None:
        _file.close()
    _file = file


@dataclass(frozen=True)
class Offer:
    """A process that offers its stacks."""

    pid: int
    label: str
    memory: str
    """The path below ``/proc`` of what it writes them into."""


def offer_of(pid: int) -> Offer | None:
    """What a process offers; None of one that offers nothing, has ended, or belongs to somebody else."""
    with suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(descriptor.path)
                if target.startswith(f"/memfd:{MARK}") and _catches(pid):
                    label = target.removeprefix(f"/memfd:{MARK}").removesuffix(" (deleted)")
                    return Offer(pid, label, descriptor.path)
    return None


def labelled(beginning: str) -> list[Offer]:
    """All processes on this machine that offer their stacks under a label that begins so."""
    offers = [offer for pid in psutil.pids() if (offer := offer_of(pid)) is not None]
    return [offer for offer in offers if offer.label.startswith(beginning)]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP; one that a debugger holds is not."""
    return _status(pid) == psutil.STATUS_STOPPED


def tree(root: int) -> list[int]:
    """A process and all its descendants, by their ids."""
    try:
        process = psutil.Process(root)
        return [root, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def write(path: Path, pids: Iterable[int], title: str, more: Sequence[str] = ()) -> Path:
    """Write what :func:`describe` says into a new file, whose directory is made where it is missing, and ``more`` below."""
    path.parent.mkdir(exist_ok=True)
    text = "\n".join([describe(list(dict.fromkeys(pids))), *filter(None, more)])
    path.write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    return path


def kept(write: Callable[[], object]) -> str:
    """What ``write`` says, in :data:`KEEP_S` at most: the disk that it writes to may be what hangs."""
    said = [f"they could not be written within {KEEP_S:g} s"]

    def run() -> None:
        try:
            said[0] = str(write())
        except OSError as error:
            said[0] = f"they could not be written ({error})"

    thread = threading.Thread(target=run, name="stacks", daemon=True)
    thread.start()
    thread.join(KEEP_S)
    return said[0]


def describe(pids: Sequence[int]) -> str:
    """The state of each process, and the stacks of those that offer theirs; of those that do not, what is known of them."""
    offers = {pid: offer for pid in pids if (offer := offer_of(pid)) is not None}
    said = _ask([offer for pid, offer in offers.items() if _status(pid) not in STOPPED])
    parts = [
        _describe(pid, offers.get(pid), said.get(pid, "")) for pid in sorted(pids, key=lambda pid: pid not in offers)
    ]
    return "\n".join(part for part in parts if part)


def _ask(offers: Sequence[Offer]) -> dict[int, str]:
    """What each process writes now, by its id; nothing of one that does not answer."""
    before = {offer: _size(offer) for offer in offers}
    for offer in offers:
        with suppress(OSError):
            os.kill(offer.pid, SIGNAL)
    deadline, seen = time.monotonic() + WAIT_S, dict(before)
    changed = time.monotonic()
    while time.monotonic() < deadline:
        now = {offer: _size(offer) for offer in offers}
        if now != seen:
            seen, changed = now, time.monotonic()
        if all(now[offer] > before[offer] for offer in offers) and time.monotonic() - changed > SETTLED_S:
            break
        time.sleep(SETTLED_S / 5)
    return {offer.pid: _read(offer, before[offer]) for offer in offers}


def _describe(pid: int, offer: Offer | None, stacks: str) -> str:
    try:
        process = psutil.Process(pid)
        status, command = process.status(), " ".join(process.cmdline())[:200] or process.name()
    except psutil.Error:
        return ""
    name = f"{offer.label}, " if offer is not None else ""
    head = f"== process {pid}: {name}{status}, waits in the kernel at {_kernel(pid)}\n   {command}"
    if stacks:
        return f"{head}\n{stacks}"
    if status in STOPPED:
        why = "it is stopped (as by SIGSTOP), and cannot say its stacks"
    elif offer is not None:
        why = f"it did not say its stacks within {WAIT_S:g} s"
    else:
        return head  # a process of Ray, or of somebody's own: it offers none
    return "\n".join([head, f"   {why}", *(f"   | {line}" for line in _log(pid))])


def _catches(pid: int) -> bool:
    """Whether a process handles :data:`SIGNAL`: any other would end by it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return ""


def _kernel(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text() or "?"
    except OSError:
        return "?"


def _log(pid: int) -> list[str]:
    """The last lines that a process wrote to standard error, where that is a file."""
    try:
        path = Path(os.readlink(f"/proc/{pid}/fd/2"))
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LOG_BYTES, 0))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


def _size(offer: Offer) -> int:
    try:
        return os.stat(offer.memory).st_size
    except OSError:
        return 0


def _read(offer: Offer, start: int) -> str:
    try:
        with open(offer.memory, "rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace").rstrip()
    except OSError:
        return ""
