"""Fingerprints: what files hold, whatever they are called and wherever they lie.

Invariant: two fingerprints are equal if and only if the same names hold the same bytes in the same order; one byte that
differs is a file that :meth:`Fingerprint.changed_files` names. Every byte is read each time: size and time of a file prove
nothing.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_ray.console import get_logger, progress
from rlhf_ray.errors import IntegrityError, StorageError

HASHING_THREADS = 8
SAID_FROM_BYTES = 10 * 2**30
"""Reading so much takes long enough to be said."""
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Fingerprint:
    """Names of files, each with the SHA-256 of its content as hexadecimal digits."""

    files: tuple[tuple[str, str], ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all names and contents, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, content in self.files:
            digest.update(f"{name}\0{content}\0".encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        """The digits of the digest that messages show."""
        return self.digest[:SHOWN_DIGITS]

    def changed_files(self, now: Fingerprint) -> list[str]:
        """The names that one of both lacks, or under which ``now`` holds something else."""
        return sorted({name for name, _ in set(self.files) ^ set(now.files)})

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON."""
        return {"sha256": self.digest, "files": [list(file) for file in self.files]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str | Path) -> Fingerprint:
        """What :meth:`to_json` returned; anything else is an ``IntegrityError`` that names ``source``."""
        try:
            fingerprint = cls(tuple((str(name), str(digest)) for name, digest in content["files"]))
            intact = fingerprint.digest == content["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{source} is damaged: it holds a fingerprint without {error}") from error
        if not intact:
            raise IntegrityError(f"{source} is damaged: a fingerprint in it does not match its own files")
        return fingerprint


def fingerprint(files: Iterable[tuple[str, Path]], what: str) -> Fingerprint:
    """The fingerprint of ``files``, which are names and paths, in their order; ``what`` names them in messages.

    Files are read on several threads. Raises :class:`StorageError` for one that cannot be read.
    """
    named = list(files)
    try:
        statuses = [(path, path.stat()) for _, path in named]
        no_file = next((path for path, status in statuses if not stat.S_ISREG(status.st_mode)), None)
        if no_file is not None:
            raise StorageError(f"{what}: {no_file} is no regular file, so it has no fingerprint: name a file")
        total = sum(status.st_size for _, status in statuses)
        if total >= SAID_FROM_BYTES:
            get_logger("storage").info("%s: reading %.0f GB for its fingerprint", what, total / 1e9)
        with ThreadPoolExecutor(HASHING_THREADS) as threads:
            digests = threads.map(lambda file: _sha256(file[1]), named)
            if total >= SAID_FROM_BYTES:
                digests = progress(digests, f"{what}: files read", total=len(named))
            return Fingerprint(tuple((name, digest) for (name, _), digest in zip(named, digests, strict=True)))
    except OSError as error:
        raise StorageError(
            f"{what} cannot be read for its fingerprint: {error.filename}: {error.strerror or error}. Make it readable"
        ) from error


def fingerprint_content(paths: Sequence[str | Path], what: str = "") -> Fingerprint:
    """The fingerprint of files, and of all files in folders. Of a file only the suffixes of its name count, which say how it
    is read; of a file in a folder its path below that.
    """
    return fingerprint(chain.from_iterable(_files(Path(path)) for path in paths), what or ", ".join(map(str, paths)))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        yield "".join(path.suffixes), path
        return
    yield from ((str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
