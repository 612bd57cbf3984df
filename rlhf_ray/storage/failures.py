"""Why a file could not be read or written, in a sentence with the way out, whatever a library makes of the system's reason.

Invariant: an error that comes of the system (a full disk, a quota, a limit, a permission) becomes a :class:`StorageError` that
names the path and what helps; every other error stays what it is.

Python's own calls say the reason. safetensors and tokenizers have it in their text. torch writes archives through a stream
that forgets it ("unexpected pos", "iostream error"), so the file system is asked again, while what was written is still there.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import DiskFullError, RlhfRayError, StorageError

Action = Literal["write", "read"]

FULL = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the disk quota is used up"}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
TOO_MANY = {errno.EMFILE, errno.ENFILE}
NAMED = (*FULL, *REFUSED, *TOO_MANY, errno.EFBIG, errno.EIO)
"""Reasons that are looked for in the text of an error."""
HIDDEN = ("inline_container.cc", "iostream error", "PytorchStreamWriter failed", "Parent directory ")
"""What torch 2.13 says where it could not write an archive, without the reason; the last where DeepSpeed could not make one."""
PROBE_BYTES = 2**20
"""A write of this size fails too where a file of a model did not fit."""
_PENDING = re.compile(r"\.pending-(.+)-[0-9a-f]{16}(?=/|$)")


@contextmanager
def storage_errors(path: str | Path, action: Action = "write", *, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the system in the ``with`` block into a :class:`StorageError` about ``path`` with the way out.

    ``needed`` is about how many bytes the block writes.
    """
    try:
        yield
    except Exception as error:
        translated = translate(error, path, action, needed=needed)
        if translated is None:
            raise
        raise translated from error


def translate(
    error: Exception, path: str | Path, action: Action = "write", *, needed: int | None = None
) -> StorageError | None:
    """The same error as a :class:`StorageError`; none where it does not come of the system."""
    if isinstance(error, RlhfRayError):
        return None
    code = reason_of(error)
    if code is None and action == "write" and any(sign in str(error) for sign in HIDDEN):
        code = ask_again(path) or errno.EIO
    if code is None:
        return None
    place = getattr(error, "filename", None) or path
    kind = DiskFullError if code in FULL else StorageError
    return kind(explain(code, place, action, needed=needed, free=free_space(path), detail=_detail(error, code)))


def reason_of(error: BaseException) -> int | None:
    """The ``errno`` that an error carries or names in its text; none where it has none."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    numbered = re.search(r"\(os error (\d+)\)", str(error))
    if numbered is not None:
        return int(numbered[1])
    return next((code for code in NAMED if os.strerror(code) in str(error)), None)


def ask_again(path: str | Path) -> int | None:
    """The ``errno`` of a write beside ``path`` now; of a limit on the size of files where this process has one."""
    folder = existing_folder(path)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * PROBE_BYTES)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno
    return None if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY else errno.EFBIG


def explain(
    code: int,
    place: str | Path,
    action: Action,
    *,
    needed: int | None = None,
    free: tuple[int, int, Path] | None = None,
    detail: str = "",
) -> str:
    """The sentence for the system's reason ``code``; ``free`` holds free and all bytes of a disk, and where it is mounted.

    ``needed`` is about how many bytes were to be written; ``detail`` is what the error itself said.
    """
    shown = _PENDING.sub(r"\1", str(place))
    if code in FULL:
        room = [] if needed is None else [f"about {size_in_words(needed)} are needed"]
        room += [] if free is None else [f"{size_in_words(free[0])} of {size_in_words(free[1])} are free at {free[2]}"]
        counted = f" ({', '.join(room)})" if room else ""
        return (
            f"disk full: cannot {action} {shown}: {FULL[code]}{counted}; what was committed before is intact. "
            "Free some space, or use another disk, and go on: a run with rlhf-ray resume, anything else with the same command"
        )
    if code in REFUSED:
        if action == "read":
            return f"cannot read {shown}: {os.strerror(code)}. Make it readable for this user, or name another"
        return f"cannot write {shown}: {os.strerror(code)}. Make it writable, or choose a directory that is"
    if code in TOO_MANY:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"cannot open {shown}: {os.strerror(code)}, this process may have {limit}: raise the limit (ulimit -n)"
    if code == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        most = "" if limit == resource.RLIM_INFINITY else f" than {size_in_words(limit)}"
        return (
            f"cannot write {shown}: no file may be larger{most} here: raise the limit (ulimit -f), or use another disk"
        )
    return f"cannot use {shown}: {detail or os.strerror(code)}"


def free_space(path: str | Path) -> tuple[int, int, Path] | None:
    """Free bytes and all bytes of the disk that ``path`` is or would be on, and a folder there; none where it is gone."""
    folder = existing_folder(path)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free, usage.total, folder


def existing_folder(path: str | Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    folder = Path(path)
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def size_in_words(size: int) -> str:
    """Bytes as a number with a unit, in powers of ten as ``df -H`` has them."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size / 1000:.0f} kB"


def _detail(error: Exception, code: int) -> str:
    """What is to be said of an error whose reason has no sentence of its own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{os.strerror(code)} ({str(error).strip().splitlines()[0]})" if str(error).strip() else ""
