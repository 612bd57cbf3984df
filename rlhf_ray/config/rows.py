"""A look at the first rows of a data file, before anything is started.

Always true: at most ``LIMIT`` rows are looked at, each problem names file and line, and reading needs no library that a
job's processes load later. A whole file is read, with its tokens counted, by :mod:`rlhf_ray.data`.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

LIMIT = 100
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

Needs = Sequence[Sequence[str]]
"""Sets of keys; a row needs all keys of one of them."""


def row_problems(path: Path, needs: Needs) -> list[str]:
    """What is wrong with the first rows of ``path``; each message starts with the file (and the line)."""
    if not path.name.endswith(SUFFIXES):
        return [f"{path}: not a format that is read here: {', '.join(SUFFIXES)}, or a folder of a saved data set"]
    count, bad = 0, []
    try:
        for count, (where, row) in enumerate(islice(_rows(path), LIMIT), 1):  # noqa: B007 (the count is what is wanted)
            wrong = _wrong(row, needs)
            if wrong:
                bad.append(f"{where}: {wrong}")
    except _Unreadable as error:
        bad.append(str(error))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        bad.append(f"{path}: cannot be read: {error}")
    if not count and not bad:
        return [f"{path}: holds no rows"]
    return [f"{bad[0]}{f' ({len(bad)} of the first {count} rows are wrong)' if len(bad) > 1 else ''}"] if bad else []


class _Unreadable(Exception):
    """A file that is not what its name says, told with file and line."""


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    with _open(path) as file:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_rows(path, file)
        elif path.name.endswith((".csv", ".csv.gz")):
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path}:{reader.line_num}", {key: value for key, value in row.items() if value is not None}
        else:
            yield from _json_rows(path, file)


def _open(path: Path) -> TextIO:
    return (
        gzip.open(path, "rt", encoding="utf-8")
        if path.name.endswith(".gz")
        else path.open(encoding="utf-8", newline="")
    )


def _jsonl_rows(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise _Unreadable(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error


def _json_rows(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise _Unreadable(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        raise _Unreadable(f"{path}:1: a .json file is a list of rows; for one row a line name it .jsonl")
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=LIMIT)
        rows = [row for batch in islice(batches, 1) for row in batch.to_pylist()]
    except ArrowInvalid as error:
        raise _Unreadable(f"{path}: not a parquet file: {error}") from error
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _wrong(row: Any, needs: Needs) -> str:
    if not isinstance(row, dict):
        return f"a row is a mapping of keys to values, but this is a {type(row).__name__}"
    present = [keys for keys in needs if all(key in row for key in keys)]
    if not present:
        missing = " or ".join(" and ".join(repr(key) for key in keys) for keys in needs)
        return f"no {missing}; its keys are {', '.join(map(repr, row))}"
    empty = [key for key in present[0] if not isinstance(row[key], str | list) or not row[key]]
    return f"{' and '.join(repr(key) for key in empty)} must hold a text or a conversation" if empty else ""
