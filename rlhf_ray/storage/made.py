"""What was made here and what was not, so that only the former is removed.

Invariants: a name that :func:`temporary_name` gave is told from every other by itself; a directory that is removed loses the
files of its manifest and no other, and what is left of it stays beside it under a name that ends in ``.kept``; directories
that were made on the way to another are removed only while they are empty.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.console import get_logger

MANIFEST = "manifest.json"
KEPT = ".kept"
LONGEST_NAME = 200
"""Bytes of a target's name that a temporary one repeats; file systems allow 255 in all."""
_RANDOM, _CHECK = 8, 8


def temporary_name(target: str, prefix: str) -> str:
    """A new name beside ``target`` that :func:`target_of` knows again."""
    name = os.fsdecode(os.fsencode(target)[:LONGEST_NAME])
    random = uuid.uuid4().hex[:_RANDOM]
    return f"{prefix}{name}-{random}{_check(name, random)}"


def target_of(name: str, prefix: str) -> str | None:
    """The name for which :func:`temporary_name` made ``name``; none where it did not."""
    target, dash, token = name.removeprefix(prefix).rpartition("-")
    made = name.startswith(prefix) and dash and token[_RANDOM:] == _check(target, token[:_RANDOM])
    return target if made else None


def _check(name: str, random: str) -> str:
    return f"{zlib.crc32(os.fsencode(name) + random.encode()):0{_CHECK}x}"


def make_directories(path: Path, mode: int = 0o777) -> list[Path]:
    """Make a directory, with this mode, and those above it; returns those that were not there, the innermost first."""
    missing = [place for place in (path, *path.parents) if not os.path.lexists(place)]
    made: list[Path] = []
    try:
        for place in reversed(missing):
            place.mkdir(mode if place == path else 0o777)
            made.insert(0, place)
        path.mkdir(exist_ok=True)  # an error where something else stands there
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(directories: Sequence[Path]) -> None:
    """Remove directories, in this order, up to the first that holds something."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return


def remove_own(directory: Path, name: str, *, unlisted: bool = False) -> None:
    """Remove a directory that was called ``name``; files that its manifest does not list are kept beside it, in ``NAME.kept``.

    ``unlisted`` says that one without a manifest was made here too.
    """
    listed = _listed(directory)
    if listed is None and unlisted:
        shutil.rmtree(directory)
        return
    there = _files(directory)
    own = there & {*listed, MANIFEST} if listed is not None else set[str]()
    if there == own:
        shutil.rmtree(directory)
        return
    kept = _kept(directory.parent / name)
    os.rename(directory, kept)  # before anything is removed: after a crash too much is kept, and nothing is lost
    for file in sorted(own):
        (kept / file).unlink()
        remove_empty([folder for folder in (kept / file).parents if folder.is_relative_to(kept) and folder != kept])
    get_logger("storage").warning(
        "%s holds %d files that were not written by this run; they are kept", kept, len(there - own)
    )


def _files(directory: Path) -> set[str]:
    """Everything below a directory that is no directory itself, by its path there."""
    return {
        os.path.relpath(os.path.join(folder, name), directory)
        for folder, folders, names in os.walk(directory)
        for name in [*names, *(one for one in folders if os.path.islink(os.path.join(folder, one)))]
    }


def _listed(directory: Path) -> set[str] | None:
    """The files that the manifest of a directory lists; none where it has no manifest."""
    try:
        files = json.loads((directory / MANIFEST).read_bytes())["files"]
        return {str(name) for name in files} if isinstance(files, dict) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _kept(path: Path) -> Path:
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}{KEPT}{'' if number == 1 else f'-{number}'}")):
        number += 1
    return kept
