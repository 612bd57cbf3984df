"""A cache on disk for tables that take long to make.

Invariants: an entry is read back byte for byte as it was written, under a key made from everything that decides its content;
a damaged entry is noticed and made again; a folder that cannot be written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_ray.console import get_logger
from rlhf_ray.environment import expand_home
from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage import begin_directory, commit, storage_errors, verify
from rlhf_ray.storage.fingerprint import fingerprint_content

TABLE = "table.arrow"


def load_or_make(folder: str | Path | None, key: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table that ``folder`` holds under ``key``, or else a new one, which is kept there unless ``folder`` is null."""
    if folder is None:
        return make()
    entry = expand_home(folder) / key
    if entry.is_dir():
        try:
            verify(entry)
            return pa.ipc.open_file(pa.py_buffer((entry / TABLE).read_bytes())).read_all()
        except (IntegrityError, StorageError, OSError, pa.ArrowException) as error:
            get_logger("data").warning("%s; it will be made again", error)
    table = make()
    try:
        _write(entry, table)
    except StorageError as error:
        get_logger("data").warning("encoded rows are not kept for the next run (data.cache): %s", error)
    return table


def _write(entry: Path, table: pa.Table) -> None:
    pending = begin_directory(entry, replace=True)
    try:
        path = str(pending.path / TABLE)
        with storage_errors(entry), pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    except BaseException:
        pending.abort()
        raise
    commit(pending, {"rows": len(table)})


def make_key(identity: Mapping[str, Any]) -> str:
    """The key of an entry whose content ``identity`` (plain JSON) decides."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def hash_content(*paths: str | Path) -> str:
    """SHA-256 of files, and of the names and contents of all files in folders; where they lie does not count."""
    return fingerprint_content(paths).digest
