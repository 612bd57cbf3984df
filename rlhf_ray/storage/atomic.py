"""Write directories and files so that they appear whole or not at all.

Invariant: at whatever moment the process is killed, the target holds the old content or the new, complete and on disk. An
interrupted write leaves files beside the target whose names begin with ``.pending-`` or ``.replaced-``. No reader looks at
them, and the next :func:`sweep` removes them.

There is one exception. A file system that cannot swap two names in one step (NFS) needs two renames to replace an existing
directory. A crash between them leaves the old directory under ``.replaced-`` and no target; ``sweep`` puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from pathlib import Path

from rlhf_ray.errors import StorageError
from rlhf_ray.storage.failures import storage_errors

PENDING = ".pending-"
REPLACED = ".replaced-"

_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` to ``path`` and to disk, replacing a file that is there in one step."""
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
    """A directory that is filled beside its target until :meth:`commit` gives it the target's name.

    Until then several processes may write below ``path``.
    """

    def __init__(self, target: Path, path: Path, replace: bool) -> None:
        self.target = target
        self.path = path
        self._replace = replace

    def commit(self) -> None:
        """Flush everything to disk, then rename the directory to the target."""
        with storage_errors(self.target):
            _sync_tree(self.path)
            replaced = self._install()
            sync_directory(self.target.parent)
            if replaced is not None:
                shutil.rmtree(replaced)

    def abort(self) -> None:
        """Remove what was written; the target stays as it is."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _install(self) -> Path | None:
        """Rename to the target; returns where the replaced content lies now, if there was any."""
        try:
            os.rename(self.path, self.target)
            return None
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
        if not self._replace:
            raise StorageError(
                f"{self.target} exists already, made by another process meanwhile: it was not overwritten"
            )
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
    """Make an empty directory beside ``target``, to be filled and then committed under the name ``target``.

    With ``replace`` the commit replaces a target that exists; without it, such a target is a ``StorageError`` now.
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
    """Remove a directory; nobody sees a part of it under its name at any moment."""
    path = Path(path)
    with storage_errors(path):
        pending = _beside(path, PENDING)
        os.rename(path, pending)
        sync_directory(path.parent)
        shutil.rmtree(pending)


def sweep(parent: str | Path) -> list[Path]:
    """Clean up after crashed writes in the directory ``parent``; returns the paths that were removed.

    Call it only where no other process writes: it would remove that process's unfinished directory too.
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
    """Flush the names in a directory to disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux ``renameat2``); returns false if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_working_directory, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of the Linux headers
    result = renameat2(at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second), swap)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV}:
        return False
    raise OSError(code, os.strerror(code), str(second))


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
