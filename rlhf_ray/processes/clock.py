"""Whose monotonic clock a process reads, and when it was born by it.

Invariant: what cannot be known here is answered by what is next to it, and no error is raised.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot() -> str:
    """Tells machines, and their starts, apart: what has the same has the same monotonic clock."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def now_us() -> int:
    """Microseconds of the monotonic clock, which all processes of a machine share."""
    return time.monotonic_ns() // 1000


def born_us(now: int) -> int:
    """When this process started, in microseconds of the monotonic clock; ``now`` where Linux does not say."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
        return now - max(round(age_s * 1e6), 0)
    return now
