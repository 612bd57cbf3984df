"""How many processors this process may use.

Invariant: never more than the machine has, than the process is bound to (``taskset``, a batch system), or than the time
that its control group grants (a container with ``--cpus=2``), and never less than one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.processes.control_groups import CGROUPS, OWN_CGROUP, groups, read_lines


def processors() -> int:
    """The number of whole processors that work can be given here."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(int, _quotas(CGROUPS, OWN_CGROUP))]))


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """Processors that each control group around this process grants, by version 2 of them or, for its root, by version 1."""
    for group in groups(root, own):
        limit = _words(group / "cpu.max")
        if len(limit) == 2 and limit[0] != "max":
            yield int(limit[0]) / int(limit[1])
    limit = [*_words(root / "cpu/cpu.cfs_quota_us"), *_words(root / "cpu/cpu.cfs_period_us")]
    if len(limit) == 2 and int(limit[0]) > 0:
        yield int(limit[0]) / int(limit[1])


def _words(path: Path) -> list[str]:
    return " ".join(read_lines(path)).split()
