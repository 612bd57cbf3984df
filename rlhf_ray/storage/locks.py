"""Locks on files, so that one process at a time writes what they stand for.

Invariants: of all processes that ask for a file one gets it, until it closes the descriptor or ends; asking whether a file
is taken takes it from nobody.

These are locks of an open file (``F_OFD_SETLK`` of Linux): unlike those of ``flock`` they can be asked about.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from pathlib import Path

from rlhf_ray.console import get_logger

SECONDS_BETWEEN_TRIES = 0.02
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_told = set[str]()
"""Files of which it was said that they cannot be locked."""
_REGION = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, process; the whole file is 0, 0, 0, 0


def take(descriptor: int) -> bool:
    """Lock the file that is open for writing as ``descriptor``; false where another process has it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _REGION.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path not in _told:
            get_logger("storage").warning(
                "%s: its file system has no locks: take care that only one process writes it", path
            )
        _told.add(path)
    return True


def take_within(descriptor: int, seconds: float) -> bool:
    """The same, but wait for another process that has the file; false where it still has it after so many seconds."""
    by = time.monotonic() + seconds
    while not take(descriptor):
        if time.monotonic() > by:
            return False
        time.sleep(SECONDS_BETWEEN_TRIES)
    return True


def is_taken(path: Path) -> bool | None:
    """Whether a process has locked the file, this one included; None where the file system has no locks, so that none says."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # never locked, or out of this user's reach
        return False
    try:
        asked = _REGION.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = _REGION.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0]
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    finally:
        os.close(descriptor)
    return int(kind) != fcntl.F_UNLCK


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still lies at ``path``: else its owner removed it before it was locked, and a lock is of no use."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def this_process() -> str:
    """What the owner of a file writes for others to read."""
    return f"process {os.getpid()} on {socket.gethostname()}"
