"""The file that a user names for what a command finds.

Invariants: what stands there already is written over only where the user allows it, and only if it is a file of this user;
a device, a pipe, a directory or a link is never replaced. A place that is refused is refused by :meth:`OutputFile.check`,
before the work. A stream (``/dev/stdout``, ``/dev/fd/3``) or ``/dev/null`` is written to.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import RequestError
from rlhf_ray.storage.atomic import write_file
from rlhf_ray.storage.failures import storage_errors

_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})")
_OPEN_DEVICES = {os.makedev(1, 3), os.makedev(1, 7)}
"""``/dev/null`` and ``/dev/full``, which take what is written and keep nothing of it."""


@dataclass(frozen=True)
class OutputFile:
    """A file to be written; ``name`` is how messages call it, and ``overwrite`` allows a file that stands there."""

    path: Path
    name: str = "--output"
    overwrite: bool = False
    way_out: str = "name another file, or write over it with --overwrite"
    """What to do where a file stands there."""
    reads: Sequence[Path] = ()
    """Files that the command reads, none of which is ever written over."""
    ending: str | None = None
    """What the name of a file must end in, where readers go by it or other files are named after it; a stream has no ending."""

    def check(self) -> None:
        """Refuse a place that :meth:`write` would not write to, with a :class:`RequestError`."""
        with storage_errors(self.path):
            problem = self._stream_problem() if self._descriptor() is not None else self._place_problem()
        if problem:
            raise RequestError(f"{self.name} {self.path}: {problem}")

    def write(self, content: str) -> Path:
        """Write ``content``, whole or not at all where it becomes a file; returns where it lies."""
        self.check()
        descriptor = self._descriptor()
        raw = content.encode("utf-8", "backslashreplace")
        if descriptor is not None or self._is_device():
            opened = self.path if descriptor is None else os.dup(descriptor)
            with storage_errors(self.path), open(opened, "wb") as stream:
                stream.write(raw)
            return self.path
        mode = stat.S_IMODE(self.path.stat().st_mode) if self.path.exists() else None
        write_file(self.path, raw, replace=self.overwrite)
        if mode is not None:
            with storage_errors(self.path):
                self.path.chmod(mode)
        return self.path

    def _descriptor(self) -> int | None:
        """The number of the stream that the path names, if it names one."""
        text = os.fspath(self.path)
        match = _DESCRIPTOR.fullmatch(text)
        return int(match[1]) if match else _STREAMS.get(text)

    def _is_device(self) -> bool:
        return self.path.exists() and stat.S_ISCHR(self.path.lstat().st_mode)

    def _stream_problem(self) -> str:
        descriptor = self._descriptor()
        assert descriptor is not None, "asked only of streams"
        try:
            access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:
            return "no such stream is open: name a file"
        return "this stream is read from: name another, or a file" if access == os.O_RDONLY else ""

    def _place_problem(self) -> str:
        try:
            status = self.path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return self._ending_problem() or self._folder_problem()
        if stat.S_ISREG(status.st_mode):
            return self._file_problem(status) or self._ending_problem()
        if stat.S_ISLNK(status.st_mode):
            return f"is a link to {os.readlink(self.path)}, which is not followed: name that file itself, or another"
        if stat.S_ISDIR(status.st_mode):
            return "is a directory: name a file in it"
        if stat.S_ISCHR(status.st_mode) and status.st_rdev in _OPEN_DEVICES:
            return ""
        kind = (
            "a pipe" if stat.S_ISFIFO(status.st_mode) else "a socket" if stat.S_ISSOCK(status.st_mode) else "a device"
        )
        return f"is {kind}, which nothing is written to: name a file, or /dev/stdout"

    def _ending_problem(self) -> str:
        if self.ending is None or self.path.suffix == self.ending:
            return ""
        return f"does not end in {self.ending}, by which it is read: name it {self.path.with_suffix(self.ending).name}"

    def _folder_problem(self) -> str:
        folder = self.path.parent
        if not folder.is_dir():
            return f"the folder {folder} does not exist: make it, or name another file"
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            return f"the folder {folder} is not writable for this user: name a file elsewhere"
        return ""

    def _file_problem(self, status: os.stat_result) -> str:
        if any(os.path.exists(place) and os.path.samefile(self.path, place) for place in self.reads):
            return "is a file that this command reads: name another file"
        if not self.overwrite:
            return f"exists already: {self.way_out}"
        if status.st_uid != os.geteuid():
            return f"belongs to {_user(status.st_uid)}, so it is not written over: name another file"
        if not status.st_mode & 0o222:
            return "is read-only, so it is not written over: name another file"
        return self._folder_problem()


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
