"""Write directories and files so that they appear whole or not at all.

Invariant: at whatever moment the process is killed, the target holds the old content or the new, complete and on disk. An
interrupted write leaves files beside the target whose names begin with ``.pending-`` or ``.replaced-``. No reader looks at
them, and the next :func:`sweep` removes them, and nothing that others made.

There is one exception. A file system that cannot swap two names in one step (NFS) needs two renames to replace an existing
directory. A crash between them leaves the old directory under ``.replaced-`` and no target; ``sweep`` puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from rlhf_ray.errors import StorageError
from rlhf_ray.processes import progress
from rlhf_ray.storage.failures import storage_errors
from rlhf_ray.storage.made import remove_own, target_of, temporary_name

PENDING = ".pending-"
REPLACED = ".replaced-"

_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}


def write_file(path: str | Path, content: bytes | str, *, replace: bool = True) -> None:
    """Write ``content`` to ``path`` and to disk, in one step; with ``replace`` in the place of a file that is there.

    Without it a file that is there, also one made meanwhile, is a :class:`StorageError`.
    """
    path = Path(path)
    pending = _beside(path, PENDING)
    with storage_errors(path):
        try:
            with open(pending, "xb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            (os.replace if replace else rename_to_new)(pending, path)
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
                remove_own(replaced, self.target.name)

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

    With ``replace`` the commit replaces a directory that exists; without it, such a target is a ``StorageError`` now. So is
    anything but a directory. Of a directory that is replaced, files that are not in its manifest are kept beside it.
    """
    target = Path(target)
    if not replace and os.path.lexists(target):
        raise StorageError(f"{target} exists already: remove it or choose another name")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StorageError(f"{target} is not a directory, so it is not written over: move it away")
    path = _beside(target, PENDING)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    return PendingDirectory(target, path, replace)


def remove_directory(path: str | Path) -> None:
    """Remove a directory; nobody sees a part of it under its name at any moment. Files that its manifest lacks are kept."""
    path = Path(path)
    with storage_errors(path):
        pending = _beside(path, PENDING)
        os.rename(path, pending)
        sync_directory(path.parent)
        remove_own(pending, path.name)


def sweep(parent: str | Path) -> list[Path]:
    """Clean up after crashed writes in the directory ``parent``; returns the paths that were removed.

    Call it only where no other process writes: it would remove that process's unfinished directory too.
    """
    parent = Path(parent)
    removed = []
    with storage_errors(parent):
        for name in sorted(os.listdir(parent)):
            path = parent / name
            if path.is_symlink() or path.lstat().st_uid != os.geteuid():
                continue
            if (target := target_of(name, REPLACED)) is not None and not os.path.lexists(parent / target):
                os.rename(path, parent / target)
                sync_directory(parent)
            elif (target := target or target_of(name, PENDING)) is not None:
                removed.append(_remove(path, target))
    return removed


def sync_directory(path: str | Path) -> None:
    """Flush the names in a directory to disk."""
    flush(path, os.O_RDONLY | os.O_DIRECTORY)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; returns false if the system or the file system cannot."""
    return _rename_in_one_step(first, second, flags=2)  # RENAME_EXCHANGE of the Linux headers


def rename_to_new(source: Path, target: Path) -> None:
    """Rename a file to a name that nothing has; raises ``FileExistsError`` where something has it."""
    if not _rename_in_one_step(source, target, flags=1):  # RENAME_NOREPLACE
        os.link(source, target)
        os.unlink(source)


def _rename_in_one_step(first: Path, second: Path, *, flags: int) -> bool:
    """Linux's ``renameat2``; returns false if the system or the file system has no such flags."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_working_directory = -100  # AT_FDCWD
    result = renameat2(at_working_directory, os.fsencode(first), at_working_directory, os.fsencode(second), flags)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV}:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _beside(target: Path, prefix: str) -> Path:
    return target.parent / temporary_name(target.name, prefix)


def _remove(path: Path, target: str) -> Path:
    if path.is_dir():
        remove_own(path, target, unlisted=True)
    else:
        path.unlink()
    return path


def _sync_tree(root: Path) -> None:
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _sync_tree(Path(entry))
            else:
                flush(entry.path)
    sync_directory(root)


def flush(path: str | Path, flags: int = os.O_RDONLY) -> None:
    """Flush a file, or with other ``flags`` what they open, to disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    progress.made()
