"""Manifests: the list of the files in a committed directory, with the size and hash of each.

Invariant: a directory that :func:`verify` accepts holds exactly the files that were committed, each with the size and
SHA-256 that it had then, and the manifest itself is byte for byte what was written. Anything else raises an
``IntegrityError`` that names the files and what differs. The bytes of a file are hashed once, where it was written: a commit
believes the records of other processes, and looks at the names and sizes.
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

from rlhf_ray.errors import IntegrityError, RequestError, StorageError
from rlhf_ray.processes import progress
from rlhf_ray.storage.atomic import PendingDirectory, begin_directory, flush
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
            of_another_version = not intact and _is_of_another_version(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(f"{source} is damaged: {error or type(error).__name__}") from error
        if of_another_version:
            raise RequestError(
                f"{source} was written by another version of rlhf_ray, in format {content['format']!r}; this one reads format "
                f"{FORMAT}: go on with that version"
            )
        if not intact:
            raise IntegrityError(f"{source} is damaged: its content does not match its own checksum")
        return manifest


def _is_of_another_version(content: Mapping[str, Any]) -> bool:
    """Whether a manifest of another format is whole."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return bool(content["format"] != FORMAT and content["checksum"] == hashlib.sha256(_render(rest)).hexdigest())


def _render(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def commit(
    pending: PendingDirectory,
    about: Mapping[str, Any] | None = None,
    expected: Collection[str] = (),
    hashed: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Write the manifest of a pending directory and commit it; if that fails, nothing is left behind.

    ``hashed`` holds what :func:`hash_files` returned to the processes that wrote these files; the others are hashed here.
    ``expected`` names files that must be there too. One of them that is missing, or has another size here, is a
    ``StorageError``.
    """
    try:
        hashed = dict(hashed or {})
        sizes = _sizes(pending.path)
        _check_seen(pending.target, sizes, {*expected, *hashed}, hashed)
        files = hashed | _hashes(pending.path, sizes.keys() - hashed.keys())
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
    unchanged = {name: record for name, record in manifest.files.items() if name not in changed}
    return commit(pending, manifest.about, changed, unchanged)


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


def verify(directory: str | Path, *, contents: bool = True) -> Manifest:
    """Read every file of a committed directory; returns its manifest, or raises ``IntegrityError`` if anything differs.

    Without ``contents`` it reads the manifest alone, and looks at the names and sizes of the files.
    """
    manifest = read_manifest(directory)
    phrases = differences(directory, manifest, contents=contents)
    if phrases:
        more = f"; and {len(phrases) - SHOWN_DIFFERENCES} more" if len(phrases) > SHOWN_DIFFERENCES else ""
        raise IntegrityError(f"{directory} is not what was committed: {'; '.join(phrases[:SHOWN_DIFFERENCES])}{more}")
    return manifest


def differences(directory: str | Path, manifest: Manifest, *, contents: bool = True) -> list[str]:
    """The differences between a directory and a manifest, one phrase for each file that differs; see :func:`verify`."""
    root, committed = Path(directory), manifest.files
    sizes = _sizes(root)
    alike = {name for name, size in sizes.items() if name in committed and committed[name].size == size}
    hashes = _hashes(root, alike) if contents else {name: committed[name] for name in alike}
    phrases = []
    for name in sorted(sizes.keys() | committed.keys()):
        if name not in sizes:
            phrases.append(f"{name} is missing")
        elif name not in committed:
            phrases.append(f"{name} is not in the manifest")
        elif name not in alike:
            phrases.append(f"{name} has {sizes[name]} bytes instead of {committed[name].size}")
        elif hashes[name].sha256 != committed[name].sha256:
            phrases.append(
                f"{name} has different content (SHA-256 {hashes[name].sha256[:12]} instead of "
                f"{committed[name].sha256[:12]})"
            )
    return phrases


def hash_files(
    root: str | Path, names: Collection[str] | None = None, *, threads: int = HASHING_THREADS
) -> dict[str, FileRecord]:
    """Flush files to disk and hash them, for the process that wrote them; ``names`` are those below ``root`` (None: all).

    One thread is that of the caller.
    """
    root = Path(root)
    names = _sizes(root).keys() if names is None else names
    with storage_errors(root):
        for name in names:
            flush(root / name)
    return _hashes(root, names, threads)


def _check_seen(
    target: Path, sizes: Mapping[str, int], wanted: Collection[str], hashed: Mapping[str, FileRecord]
) -> None:
    """Refuse a directory in which another node has written what this one does not see."""
    shared = "every node must see the same directory (use a shared file system)"
    missing = sorted(name for name in wanted if name not in sizes)
    if missing:
        raise StorageError(
            f"{target}: {len(missing)} of {len(wanted)} files that other processes wrote are missing, such as {missing[0]}: "
            f"{shared}"
        )
    for name, record in hashed.items():
        if sizes[name] != record.size:
            raise StorageError(
                f"{target}: {name} has {sizes[name]} bytes here and {record.size} where it was written: {shared}"
            )


def _hashes(root: Path, names: Collection[str], threads: int = HASHING_THREADS) -> dict[str, FileRecord]:
    """Hash these files below ``root``, on several threads, or on that of the caller."""
    ordered = sorted(names)
    with storage_errors(root, "read"):
        if threads == 1:
            return {name: _record(root / name) for name in ordered}
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(ordered, pool.map(lambda name: _record(root / name), ordered), strict=True))


def _sizes(root: Path) -> dict[str, int]:
    """The sizes of all files below ``root`` except its manifest."""
    with storage_errors(root, "read"):
        return {name: size for name, size in _files(root) if name != MANIFEST}


def _files(root: Path, below: str = "") -> Iterator[tuple[str, int]]:
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            status = entry.stat(follow_symlinks=False)
            mode = status.st_mode
            if stat.S_ISDIR(mode):
                yield from _files(root, f"{name}/")
            elif stat.S_ISREG(mode):
                yield name, status.st_size
            else:
                raise IntegrityError(
                    f"{root / name} is neither a file nor a directory, so a manifest cannot list it: remove it"
                )


def _record(path: Path) -> FileRecord:
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            progress.made()
            return FileRecord(os.fstat(stream.fileno()).st_size, digest)
    except OSError as error:
        if error.errno == errno.EIO:
            raise IntegrityError(f"{path} cannot be read back ({error.strerror}): the disk may be failing") from error
        raise
