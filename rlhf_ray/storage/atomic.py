"""Directories and files that appear whole or not at all.

Always true: whatever kills the process, at whatever moment, whoever opens the target finds the old content or the new
one, whole and on disk. What was interrupted lies beside the target under a name that starts with ``.pending-`` or
``.replaced-``, counts for nobody, and goes with the next :func:`sweep`.

One exception, settled by ``sweep``: on a file system that cannot swap two names in one step (NFS), a crash exactly
between the two renames that replace an existing directory leaves the old one under ``.replaced-``; ``sweep`` puts it
back. A target that did not exist before never meets this.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.errors import StorageError

PENDING = ".pending-"
REPLACED = ".replaced-"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says about ``path`` into a :class:`StorageError` that names the way out."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explain(error, path)) from error


def _explain(error: OSError, path: str | Path) -> str:
    place = error.filename or path
    if error.errno in _FULL:
        return (
            f"disk full: cannot write {place}{_free_space(Path(path))}; what was committed before is intact. "
            "Free some space, or write to another disk, and run the same command again"
        )
    if error.errno in _REFUSED:
        return f"cannot write {place}: {error.strerror}. Make it writable, or choose a directory that is"
    return f"cannot use {place}: {error.strerror or error}"


def _free_space(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return ""
    return f" ({usage.free / 1e9:.2f} GB of {usage.total / 1e9:.1f} GB are free at {path})"


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` to ``path``, replacing what is there, in one step."""
    path = Path(path)
    pending = _beside(path, PENDING)
    with storage_errors(path):
        try:
            with open(pending, "xb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(pending, path)
        except BaseException:
            pending.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


class PendingDirectory:
    """A directory being filled beside its target; several processes may write below ``path`` until it is committed."""

    def __init__(self, target: Path, path: Path, replace: bool) -> None:
        self.target = target
        self.path = path
        self._replace = replace

    def commit(self) -> None:
        """Bring everything to disk, then give the directory its name."""
        with storage_errors(self.target):
            _sync_tree(self.path)
            left_over = self._install()
            sync_directory(self.target.parent)
            if left_over is not None:
                shutil.rmtree(left_over)

    def abort(self) -> None:
        """Forget what was written; the target stays as it is."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _install(self) -> Path | None:
        """Rename to the target; return where the content that stood there before lies now."""
        try:
            os.rename(self.path, self.target)
            return None
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
        if not self._replace:
            raise StorageError(f"{self.target} exists already: nothing was written over it")
        if exchange(self.path, self.target):
            return self.path
        old = _beside(self.target, REPLACED)
        os.rename(self.target, old)
        try:
            os.rename(self.path, self.target)
        except BaseException:
            os.rename(old, self.target)
            raise
        return old


def begin_directory(target: str | Path, *, replace: bool = False) -> PendingDirectory:
    """Make an empty directory beside ``target``; :meth:`PendingDirectory.commit` gives it the name ``target``.

    With ``replace`` a target that exists is exchanged for the new one at the commit; without, it is an error now.
    """
    target = Path(target)
    if not replace and target.exists():
        raise StorageError(f"{target} exists already: remove it or choose another name")
    path = _beside(target, PENDING)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    return PendingDirectory(target, path, replace)


def remove_directory(path: str | Path) -> None:
    """Remove a directory so that no moment shows half of it under its name."""
    path = Path(path)
    with storage_errors(path):
        pending = _beside(path, PENDING)
        os.rename(path, pending)
        sync_directory(path.parent)
        shutil.rmtree(pending)


def sweep(parent: str | Path) -> list[Path]:
    """Settle what crashes left in ``parent`` and return what was removed.

    Only for whoever alone writes there: a commit that another process has under way would be swept too.
    """
    parent = Path(parent)
    removed = []
    with storage_errors(parent):
        for old in sorted(parent.glob(f"{REPLACED}*")):
            target = parent / old.name.removeprefix(REPLACED).rpartition("-")[0]
            if target.exists():
                removed.append(_remove(old))
            else:
                os.rename(old, target)
                sync_directory(parent)
        removed += [_remove(pending) for pending in sorted(parent.glob(f"{PENDING}*"))]
    return removed


def sync_directory(path: str | Path) -> None:
    """Bring the names in a directory to disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux ``renameat2``); false where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_working_directory, swap = -100, 2
    result = renameat2(at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second), swap)
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV}:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _beside(target: Path, prefix: str) -> Path:
    return target.parent / f"{prefix}{target.name}-{uuid.uuid4().hex[:12]}"


def _remove(path: Path) -> Path:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path


def _sync_tree(root: Path) -> None:
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _sync_tree(Path(entry))
            else:
                _sync(entry.path, os.O_RDONLY)
    sync_directory(root)


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
