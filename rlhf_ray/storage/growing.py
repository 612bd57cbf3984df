"""A file of lines that one process at a time adds to, and that another goes on with where it was interrupted.

Invariants: a second writer is refused by the name of the first; until the file is finished, one beside it with the ending
``.unfinished`` says what it is made of and who writes it; it is gone on with only where it is made of the same; neither is
touched where they are somebody else's; a writer that adds no line leaves nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_ray.errors import RequestError
from rlhf_ray.storage.failures import storage_errors
from rlhf_ray.storage.locks import is_at, take, this_process
from rlhf_ray.storage.made import make_directories, remove_empty
from rlhf_ray.storage.output import OutputFile

UNFINISHED = ".unfinished"
WRITER = "writer"


class GrowingFile:
    """The lines at ``path``, owned by this process from the start of this object to :meth:`close`, or the end of ``with``.

    ``made_of`` is plain JSON: what decides the lines; ``reads`` are files that they are made from. Raises
    :class:`RequestError` where the file is finished, another process writes it, it is made of something else, or nothing can
    be written there.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any], reads: Sequence[Path] = ()) -> None:
        self.path = path
        self.done = 0
        """Whole lines, those of an interrupted writer included."""
        self._about = path.with_name(path.name + UNFINISHED)
        self._made_of = json.loads(json.dumps(dict(made_of)))
        self._lock: int | None = None
        self._lines: BinaryIO | None = None
        self._finished = False
        with storage_errors(path):
            self._require_place(reads)
            self._directories = make_directories(path.parent)
        try:
            self._lock = self._own()
            self._lines = self._go_on(self._lock)
        except BaseException:
            self.close()
            raise

    def _require_place(self, reads: Sequence[Path]) -> None:
        """Refuse what is no file: to go on after an interruption the lines must stay where they are written."""
        for place in (self._about, self.path):
            if os.path.lexists(place):
                OutputFile(place, overwrite=True, reads=reads).check()
        if self.path.exists() and not self.path.is_file():
            raise RequestError(f"--output {self.path} keeps no lines, so nothing could go on after them: name a file")
        if self.path.exists() and not self._about.exists():
            raise self._is_finished()

    def _is_finished(self) -> RequestError:
        return RequestError(f"{self.path} exists and is finished: remove it, or give another --output")

    def _own(self) -> int:
        """The open file beside the lines, locked; it is made where it is not there."""
        with storage_errors(self._about):
            while True:
                descriptor = os.open(self._about, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                if not take(descriptor):
                    writer = (_parse(descriptor) or {}).get(WRITER, "another process")
                    os.close(descriptor)
                    raise RequestError(
                        f"{self.path} is being written by {writer}: wait for it, or give another --output"
                    )
                if is_at(descriptor, self._about):
                    return descriptor
                os.close(descriptor)  # its writer finished between our opening and our locking it

    def _go_on(self, lock: int) -> BinaryIO:
        """Take up the lines of an interrupted writer, without the torn one after them, or begin."""
        before = _parse(lock)
        if before is None or (before and WRITER not in before):
            raise RequestError(
                f"{self._about} was not written by this command, so {self.path} is not gone on with: move it away, or give "
                "another --output"
            )
        if not before and self.path.exists():  # it was finished just now, and the file beside it is new
            self._about.unlink()
            raise self._is_finished()
        before.pop(WRITER, None)
        with storage_errors(self.path):
            lines, whole = self._count()
            if lines and before != self._made_of:
                raise RequestError(
                    f"{self.path} was begun with another input, model or limit ({self._about.name} says which): give the same "
                    "again to go on with it, or remove both files"
                )
            about = json.dumps({**self._made_of, WRITER: this_process()}, sort_keys=True).encode()
            # Never empty, not even where this fails on a full disk: lines beside an empty file count as finished.
            os.pwrite(lock, about.ljust(os.fstat(lock).st_size), 0)
            file = self.path.open("ab")
            file.truncate(whole)
        self.done = lines
        return file

    def _count(self) -> tuple[int, int]:
        """The whole lines that are there, and their bytes."""
        lines = whole = 0
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        lines, whole = lines + 1, whole + len(line)
        return lines, whole

    def extend(self, lines: Sequence[str]) -> None:
        """Add lines, each without its end; they are on disk when this returns."""
        assert self._lines is not None, "not closed"
        with storage_errors(self.path):
            self._lines.write("".join(f"{line}\n" for line in lines).encode())
            self._lines.flush()
            os.fsync(self._lines.fileno())
        self.done += len(lines)

    def finish(self) -> None:
        """Mark the file as finished."""
        with storage_errors(self.path):
            self._about.unlink()
        self._finished = True

    def close(self) -> None:
        """Let another process go on; a second call does nothing."""
        if self._lines is not None:
            with suppress(OSError):  # what could not be written has been told, and is tried once more here
                self._lines.close()
            if not self.done and not self._finished:
                self.path.unlink(missing_ok=True)
                self._about.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
        self._lines = self._lock = None
        if not self.done:
            remove_empty(self._directories)

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(descriptor: int) -> dict[str, Any] | None:
    """What stands in the file beside the lines: empty where it was just made, none where somebody else wrote it."""
    raw = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    try:
        content = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
