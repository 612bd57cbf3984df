"""What a power cut may leave of files that a program has written, as far as POSIX promises anything.

Invariants: bytes that were flushed to disk (``fsync`` of the file) stay, and so do names (``fsync`` of their directory); each
other change since then may be there or not. :class:`Unsynced` follows the operations of a program and knows what is not
flushed; :func:`cut` makes of a copy of the files what a cut leaves where nothing else was written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Loss = Literal["nothing", "bytes", "names", "bytes and names", "zeros"]
"""What a cut takes of what was not flushed; ``zeros``: a file has its length, but its bytes are not there."""
LOSSES: tuple[Loss, ...] = ("nothing", "bytes", "names", "bytes and names", "zeros")


@dataclass
class Change:
    """A change of the names in a directory: ``kind`` is ``made``, ``renamed``, ``swapped``, ``removed`` or ``emptied``."""

    kind: Literal["made", "renamed", "swapped", "removed", "emptied"]
    directory: int
    """The inode of the directory; of one that was removed since another number, since another may get its inode."""
    name: str
    other: tuple[int, str] | None = None
    """Directory and name from which it was renamed."""
    content: bytes | None = None
    """Of the file that had the name before."""
    was: int | None = None
    """The number of the directory that was removed."""


@dataclass
class Unsynced:
    """What would be lost now: ``content`` has what each changed file held when it was flushed last, by its inode."""

    content: dict[int, bytes] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    removed_directories: int = 0

    def written(self, path: str) -> None:
        """A file is about to be written or cut."""
        inode = os.stat(path).st_ino
        if inode not in self.content:
            self.content[inode] = Path(path).read_bytes()

    def made(self, path: str, *, linked: bool = False) -> None:
        """A file or directory has just been made, or ``linked``: a file got another name."""
        if not linked and not os.path.isdir(path):
            self.content[os.lstat(path).st_ino] = b""
        self.changes.append(Change("made", *_place(path)))

    def removed(self, path: str) -> None:
        """A file is about to be removed."""
        self.changes.append(Change("removed", *_place(path), content=Path(path).read_bytes()))
        self.content.pop(os.lstat(path).st_ino, None)

    def emptied(self, path: str) -> None:
        """A directory is about to be removed."""
        self.removed_directories += 1
        inode, number = os.lstat(path).st_ino, -self.removed_directories
        for change in self.changes:
            if change.directory == inode:
                change.directory = number
        self.changes.append(Change("emptied", *_place(path), was=number))

    def renamed(self, source: str, target: str) -> None:
        """A name is about to become another."""
        content = Path(target).read_bytes() if os.path.isfile(target) else None
        self.changes.append(Change("renamed", *_place(target), other=_place(source), content=content))

    def swapped(self, first: str, second: str) -> None:
        """Two names are about to be swapped."""
        self.changes.append(Change("swapped", *_place(second), other=_place(first)))

    def take_back(self, change: Change) -> None:
        """A change was not made after all."""
        self.changes = [one for one in self.changes if one is not change]

    def flushed(self, inode: int) -> None:
        """A file or directory with this inode is on disk."""
        self.content.pop(inode, None)
        self.changes = [change for change in self.changes if change.directory != inode]


def _place(path: str) -> tuple[int, str]:
    parent, name = os.path.split(path)
    return os.stat(parent).st_ino, name


def inodes(root: Path) -> dict[int, str]:
    """The paths of everything below ``root``, relative to it, by inode."""
    return {os.lstat(root / path).st_ino: path for path in ["", *_below(root)]}


def _below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            yield os.path.relpath(os.path.join(folder, name), root)


def cut(copy: Path, paths: dict[int, str], unsynced: Unsynced, loss: Loss) -> None:
    """Take from ``copy`` what a power cut takes; ``paths`` are those of the original by its inodes."""
    if loss in ("bytes", "bytes and names", "zeros"):
        for inode, content in unsynced.content.items():
            if inode in paths:
                place = copy / paths[inode]
                place.write_bytes(bytes(place.stat().st_size) if loss == "zeros" else content)
    if loss in ("names", "bytes and names"):
        paths = dict(paths)
        for change in reversed(unsynced.changes):
            _undo(copy, paths, change)


def _undo(copy: Path, paths: dict[int, str], change: Change) -> None:
    if change.directory not in paths or (change.other and change.other[0] not in paths):
        return  # its directory is gone
    place = copy / paths[change.directory] / change.name
    if change.kind == "made":
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    elif change.kind == "removed":
        place.write_bytes(change.content or b"")
    elif change.kind == "emptied":
        place.mkdir(exist_ok=True)
        paths[change.was or 0] = str(place.relative_to(copy))
    elif change.other is not None:
        source = copy / paths[change.other[0]] / change.other[1]
        between = copy / ".between"
        os.rename(place, between)
        if change.kind == "swapped":
            os.rename(source, place)
        os.rename(between, source)
        _move(paths, str(place.relative_to(copy)), str(source.relative_to(copy)), both=change.kind == "swapped")
        if change.content is not None:
            place.write_bytes(change.content)


def _move(paths: dict[int, str], old: str, new: str, *, both: bool) -> None:
    """Follow a rename in ``paths``."""
    for inode, path in list(paths.items()):
        for before, after in ((old, new), (new, old)) if both else ((old, new),):
            if path == before or path.startswith(f"{before}/"):
                paths[inode] = after + path[len(before) :]
                break
