"""How much memory of this machine is free for a copy of a training state.

Invariant: what is called free can be had without ending a process: neither the machine nor a control group around this process
(a container, a batch job) runs out of memory by it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.processes.control_groups import CGROUPS, OWN_CGROUP, groups, groups_of
from rlhf_ray.storage.failures import size_in_words

KEPT_FREE = 0.05
"""The part of the memory that a copy leaves free."""
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""What holds the limit and the use of a control group, and the entry of its memory.stat that is the cache of files."""


@dataclass(frozen=True)
class Room:
    """What a copy of one rank's state takes, and what is free for the copies of all ranks on its machine, in bytes."""

    machine: str
    needed: int
    free: int


def room_for(needed: int) -> Room:
    """The room for a copy of ``needed`` bytes, here and now."""
    memory = psutil.virtual_memory()
    limits = [(memory.total, memory.available), *_control_groups(CGROUPS, OWN_CGROUP)]
    return Room(socket.gethostname(), needed, int(min(free - KEPT_FREE * total for total, free in limits)))


def used_share() -> float:
    """The share of the memory in use, of this machine or of a control group around this process, whichever is larger."""
    memory = psutil.virtual_memory()
    limits = [(memory.total, memory.available), *_control_groups(CGROUPS, OWN_CGROUP)]
    return max(1.0 - free / total for total, free in limits)


def shortage(rooms: Iterable[Room]) -> str | None:
    """Where the copies of all ranks do not fit, in words; none where they do. Ranks of one machine share what is free."""
    machines: dict[str, list[Room]] = {}
    for room in rooms:
        machines.setdefault(room.machine, []).append(room)
    for machine, there in machines.items():
        needed, free = sum(room.needed for room in there), max(0, min(room.free for room in there))
        if needed > free:
            return f"{size_in_words(needed)} on {machine}, where {size_in_words(free)} are free"
    return None


def _control_groups(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """The memory of each control group around this process that has a limit, and what of it is free."""
    for group in groups(root, own):
        yield from _memory_of(group, *V2)
    for group in groups_of("memory", root, own):
        yield from _memory_of(group, *V1)


def _memory_of(group: Path, maximum: str, current: str, cache: str) -> list[tuple[int, int]]:
    try:
        limit, used = (group / maximum).read_text().strip(), int((group / current).read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    return [(int(limit), int(limit) - used + int(pages.get(cache, 0)))]  # the cache of files is given up
