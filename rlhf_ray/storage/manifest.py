"""Manifests: what a committed directory holds, byte for byte.

Always true: a directory that :func:`verify` accepts holds exactly the files that were committed, each with the size and
SHA-256 that it had then, and the manifest itself is byte for byte what was written; anything else raises an
``IntegrityError`` that names the files and what differs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage.atomic import PendingDirectory, storage_errors

MANIFEST = "manifest.json"
FORMAT = 1
HASHING_THREADS = 8
SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a directory by their path below it, and ``about``: what its writer says of them (plain JSON)."""

    files: Mapping[str, FileRecord]
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The manifest as it stands on disk: canonical JSON that carries its own checksum."""
        content = {
            "format": FORMAT,
            "about": dict(self.about),
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        return _render({**content, "checksum": hashlib.sha256(_render(content)).hexdigest()})

    @classmethod
    def from_bytes(cls, raw: bytes, source: str | Path) -> Manifest:
        """Parse what :meth:`to_bytes` wrote; any other byte is an ``IntegrityError``."""
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
    """Write the manifest of a pending directory and commit it; nothing is left behind when that fails.

    ``expected`` names files that must be there: what other processes say that they wrote.
    """
    try:
        files = _records(pending.path)
        missing = sorted(set(expected) - files.keys())
        if missing:
            raise StorageError(
                f"{pending.target}: {len(missing)} of {len(set(expected))} files that other processes wrote are not "
                f"there, such as {missing[0]}: every node must see the same directory (use a shared file system)"
            )
        manifest = Manifest(files, dict(about or {}))
        with storage_errors(pending.target), open(pending.path / MANIFEST, "wb") as stream:
            stream.write(manifest.to_bytes())
        pending.commit()
    except BaseException:
        pending.abort()
        raise
    return manifest


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a directory, itself checked; the files are not looked at."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: the directory was never committed, or has lost it")
    with storage_errors(path):
        raw = path.read_bytes()
    return Manifest.from_bytes(raw, path)


def verify(directory: str | Path) -> Manifest:
    """Read every file of a committed directory and return its manifest; ``IntegrityError`` when anything differs."""
    manifest = read_manifest(directory)
    found = differences(directory, manifest)
    if found:
        more = f"; and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
        raise IntegrityError(f"{directory} is not what was committed: {'; '.join(found[:SHOWN_DIFFERENCES])}{more}")
    return manifest


def differences(directory: str | Path, manifest: Manifest) -> list[str]:
    """What differs between a directory and a manifest, a phrase for each file."""
    found = _records(Path(directory))
    phrases = []
    for name in sorted(found.keys() | manifest.files.keys()):
        here, wanted = found.get(name), manifest.files.get(name)
        if here is None:
            phrases.append(f"{name} is missing")
        elif wanted is None:
            phrases.append(f"{name} is not in the manifest")
        elif here.size != wanted.size:
            phrases.append(f"{name} has {here.size} bytes instead of {wanted.size}")
        elif here.sha256 != wanted.sha256:
            phrases.append(f"{name} has other content (SHA-256 {here.sha256[:12]} instead of {wanted.sha256[:12]})")
    return phrases


def _records(root: Path) -> dict[str, FileRecord]:
    """Hash every file below ``root``, its manifest apart, on several threads."""
    with storage_errors(root):
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
                raise IntegrityError(f"{root / name} is neither a file nor a directory: a manifest cannot vouch for it")


def _record(path: Path) -> FileRecord:
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return FileRecord(os.fstat(stream.fileno()).st_size, digest)
    except OSError as error:
        if error.errno == errno.EIO:
            raise IntegrityError(f"{path} cannot be read back: {error.strerror}") from error
        raise
