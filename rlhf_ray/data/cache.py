"""Tables that took long to make, kept for the next run.

Always true: an entry is read back byte for byte as it was written, under a key made from all that decides its content; one
that is damaged is noticed and made again; a folder that cannot be written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_ray.console import get_logger
from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage import begin_directory, commit, storage_errors, verify

TABLE = "table.arrow"


def cached(folder: str | Path | None, key: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table under ``key``, made where ``folder`` does not hold it; a null folder holds nothing."""
    if folder is None:
        return make()
    entry = Path(folder).expanduser() / key
    if entry.is_dir():
        try:
            verify(entry)
            return pa.ipc.open_file(pa.py_buffer((entry / TABLE).read_bytes())).read_all()
        except (IntegrityError, StorageError, OSError, pa.ArrowException) as error:
            get_logger("data").warning("%s; it is made again", error)
    table = make()
    try:
        _keep(entry, table)
    except StorageError as error:
        get_logger("data").warning("encoded rows are not kept for the next run (data.cache): %s", error)
    return table


def _keep(entry: Path, table: pa.Table) -> None:
    pending = begin_directory(entry, replace=True)
    try:
        path = str(pending.path / TABLE)
        with storage_errors(entry), pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    except BaseException:
        pending.abort()
        raise
    commit(pending, {"rows": len(table)})


def key_of(about: Mapping[str, Any]) -> str:
    """A name for what ``about`` (plain JSON) says."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def content_hash(*paths: str | Path) -> str:
    """SHA-256 of files, and of the names and contents of all files in folders; wherever they lie."""
    digest = hashlib.sha256()
    for name, file in chain.from_iterable(_files(Path(path)) for path in paths):
        with open(file, "rb") as stream:
            digest.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        yield "".join(path.suffixes), path  # the format, which the name says
        return
    yield from ((str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file())
