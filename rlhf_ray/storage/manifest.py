"""Manifests: the list of the files in a committed directory, with the size and hash of each.

Invariant: a directory that :func:`verify` accepts holds exactly the files that were committed, each with the size and
SHA-256 that it had then, and the manifest itself is byte for byte what was written. Anything else raises an
``IntegrityError`` that names the files and what differs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage.atomic import PendingDirectory, begin_directory
from rlhf_ray.storage.failures import storage_errors
from rlhf_ray.storage.made import MANIFEST

FORMAT = 1
HASHING_THREADS = 8
SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a directory by their path below it, and ``about``: plain JSON that the writer adds."""

    files: Mapping[str, FileRecord]
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The manifest as stored on disk: canonical JSON with a checksum of itself."""
        content = {
            "format": FORMAT,
            "about": dict(self.about),
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        return _render({**content, "checksum": hashlib.sha256(_render(content)).hexdigest()})

    @classmethod
    def from_bytes(cls, raw: bytes, source: str | Path) -> Manifest:
        """Parse the output of :meth:`to_bytes`; one byte that differs is an ``IntegrityError`` that names ``source``."""
        try:
            content = json.loads(raw)
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            manifest = cls(files, content["about"])
            intact = manifest.to_bytes() == raw
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(f"{source} is damaged: {error or type(error).__name__}") from error
        if not intact:
            raise IntegrityError(f"{source} is damaged: its content does not match its own checksum")
        return manifest


def _render(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def commit(
    pending: PendingDirectory, about: Mapping[str, Any] | None = None, expected: Collection[str] = ()
) -> Manifest:
    """Write the manifest of a pending directory and commit it; if that fails, nothing is left behind.

    ``expected`` names the files that other processes report to have written: a missing one is a ``StorageError``.
    """
    try:
        files = _records(pending.path)
        missing = sorted(set(expected) - files.keys())
        if missing:
            raise StorageError(
                f"{pending.target}: {len(missing)} of {len(set(expected))} files that other processes wrote are "
                f"missing, such as {missing[0]}: every node must see the same directory (use a shared file system)"
            )
        manifest = Manifest(files, dict(about or {}))
        with storage_errors(pending.target), open(pending.path / MANIFEST, "wb") as stream:
            stream.write(manifest.to_bytes())
        pending.commit()
    except BaseException:
        pending.abort()
        raise
    return manifest


def amend(directory: str | Path, changed: Mapping[str, str]) -> Manifest:
    """Commit a directory anew in which the files named by ``changed`` have these contents; returns its manifest.

    The other files are not copied where the file system knows hard links.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    pending = begin_directory(directory, replace=True)
    try:
        with storage_errors(directory):
            for name in manifest.files.keys() | changed.keys():
                target = pending.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if name in changed:
                    target.write_text(changed[name])
                else:
                    _link_or_copy(directory / name, target)
    except BaseException:
        pending.abort()
        raise
    return commit(pending, manifest.about, manifest.files.keys())


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check the manifest of a directory, without looking at its files."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: the directory was never committed, or its manifest was removed")
    with storage_errors(path, "read"):
        raw = path.read_bytes()
    return Manifest.from_bytes(raw, path)


def verify(directory: str | Path) -> Manifest:
    """Read every file of a committed directory; returns its manifest, or raises ``IntegrityError`` if anything differs."""
    manifest = read_manifest(directory)
    phrases = differences(directory, manifest)
    if phrases:
        more = f"; and {len(phrases) - SHOWN_DIFFERENCES} more" if len(phrases) > SHOWN_DIFFERENCES else ""
        raise IntegrityError(f"{directory} is not what was committed: {'; '.join(phrases[:SHOWN_DIFFERENCES])}{more}")
    return manifest


def differences(directory: str | Path, manifest: Manifest) -> list[str]:
    """The differences between a directory and a manifest, one phrase for each file that differs."""
    stored = _records(Path(directory))
    phrases = []
    for name in sorted(stored.keys() | manifest.files.keys()):
        actual, committed = stored.get(name), manifest.files.get(name)
        if actual is None:
            phrases.append(f"{name} is missing")
        elif committed is None:
            phrases.append(f"{name} is not in the manifest")
        elif actual.size != committed.size:
            phrases.append(f"{name} has {actual.size} bytes instead of {committed.size}")
        elif actual.sha256 != committed.sha256:
            phrases.append(
                f"{name} has different content (SHA-256 {actual.sha256[:12]} instead of {committed.sha256[:12]})"
            )
    return phrases


def _records(root: Path) -> dict[str, FileRecord]:
    """Hash every file below ``root`` except its manifest, on several threads."""
    with storage_errors(root, "read"):
        names = sorted(set(_file_names(root)) - {MANIFEST})
        with ThreadPoolExecutor(HASHING_THREADS) as threads:
            return dict(zip(names, threads.map(lambda name: _record(root / name), names), strict=True))


def _file_names(root: Path, below: str = "") -> Iterator[str]:
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                yield from _file_names(root, f"{name}/")
            elif stat.S_ISREG(mode):
                yield name
            else:
                raise IntegrityError(
                    f"{root / name} is neither a file nor a directory, so a manifest cannot list it: remove it"
                )


def _record(path: Path) -> FileRecord:
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return FileRecord(os.fstat(stream.fileno()).st_size, digest)
    except OSError as error:
        if error.errno == errno.EIO:
            raise IntegrityError(f"{path} cannot be read back ({error.strerror}): the disk may be failing") from error
        raise
