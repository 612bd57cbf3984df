"""Read whole files of this project that anybody may have edited, or put something else in the place of.

Invariant: a call returns what a file holds or raises an error that names it: it waits for no pipe and reads no device.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rlhf_ray.errors import IntegrityError
from rlhf_ray.storage.failures import storage_errors


def read_bytes(path: str | Path, offset: int = 0) -> bytes:
    """The content of a file, from ``offset`` on.

    Raises :class:`StorageError` if it cannot be read, :class:`IntegrityError` if it is no file.
    """
    with storage_errors(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with open(descriptor, "rb") as stream:
                stream.seek(offset)
                return stream.read()
        os.close(descriptor)
    raise not_a_file(path)


def read_text(path: str | Path) -> str:
    """The same for text in UTF-8."""
    raw = read_bytes(path)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise IntegrityError(
            f"{path} is damaged: byte {error.start + 1} is not UTF-8. Restore the file from a backup"
        ) from error


def not_a_file(path: str | Path) -> IntegrityError:
    """The error about a directory, a pipe or a device where a file is expected."""
    return IntegrityError(f"{path} is not a regular file: move away what is there, and restore the file")
