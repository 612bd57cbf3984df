"""A file of lines that keeps its last two parts, which processes on other nodes read as it grows.

Invariants: a line that cannot be written leaves nothing of itself. The file is open for no longer than a line takes, since what
is closed, other nodes see on a network disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

PART_BYTES = 2**20
"""A part that has grown so large becomes the older one, in the place of that before."""


def older_part(path: Path) -> Path:
    """Where the part before the one at ``path`` is."""
    return path.with_name(path.name + ".older")


def add_line(path: Path, line: bytes, head: Callable[[bool], bytes]) -> None:
    """Add a line; a part begins with what ``head`` returns, which is told whether there was one before.

    Raises :class:`OSError`.
    """
    older = older_part(path)
    if path.exists() and path.stat().st_size > PART_BYTES:
        os.replace(path, older)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        size = os.fstat(descriptor).st_size
        text = line if size else head(older.exists()) + line
        written = os.write(descriptor, text)
        if written < len(text):
            os.ftruncate(descriptor, size)  # else the next line would be torn with this one
            raise OSError(errno.ENOSPC, f"{written} of {len(text)} bytes were written")
    finally:
        os.close(descriptor)
