"""Raw rows of one data file, whatever its format: JSON lines, a JSON list, CSV, Parquet or Arrow.

Invariants: rows come one by one, in the order of the file, each with the place where it begins: ``file:line``, or
``file: row n`` in tables, which have no lines. Whatever is wrong with a file is one :class:`DataError` that begins with
that place and holds nothing of the rows' texts. Values come as they are written: a date stays a text, in CSV every cell is
one, and what a table keeps as JSON is decoded. Reading needs neither the ``datasets`` library nor a copy of the file.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError

PlacedRows = Iterator[tuple[str, Any]]
"""For each row the place where it begins and its content, which is not yet known to be a mapping."""

Decoder = Callable[[Any], Any]
"""Makes a value of what a table holds for it."""
BATCH_ROWS = 1000
"""Rows of a table that are turned into Python objects at once."""
LONGEST_LINE = 2**28
"""Bytes of a line; a file that was compressed may hold far longer ones than the memory does."""
LONGEST_LIST = 2**31
"""Characters of a list of rows, which is in memory as a whole."""
BLANKS = " \t\r\n"
"""What JSON allows between values."""


def raw_rows(path: Path) -> PlacedRows:
    """The rows of a file, read only as far as they are taken; raises :class:`DataError`."""
    try:
        yield from _reader(path)(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def is_file_name(path: str) -> bool:
    """Whether ``path`` has the ending of a data file, which has neither splits nor configurations."""
    return path.endswith(tuple(READERS))


def _reader(path: Path) -> Callable[[Path], PlacedRows]:
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise DataError(f"{path}: not a format that is read here: {', '.join(READERS)}, or the folder of a data set")


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, decoded one by one, so that the line of a wrong byte is known."""
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB, which no row has: write one row a line"
                )
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start + 1}") from error


def _not_json(place: str, error: ValueError | RecursionError) -> DataError:
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{place}: not JSON: {reason}")


def _jsonl_rows(path: Path) -> PlacedRows:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(f"{path}:{number}", error) from error
        yield f"{path}:{number}", row


def _json_rows(path: Path) -> PlacedRows:
    """One list, decoded element by element, so that the line of each is known."""
    parts, length = [], 0
    for part in _lines(path):
        parts.append(part)
        length += len(part)
        if length > LONGEST_LIST:
            raise DataError(f"{path}: a list of more than {LONGEST_LIST >> 30} GiB: write it as .jsonl, one row a line")
    text = "".join(parts)
    decode = json.JSONDecoder().raw_decode

    def skip_blanks(position: int) -> int:
        while position < len(text) and text[position] in BLANKS:
            position += 1
        return position

    position = skip_blanks(0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: a .json file is a list of rows; for one row a line name it .jsonl")
    # Line breaks before ``counted`` are in ``line``; ``mark`` is the character at ``position``: "[" counts as a comma.
    line, counted, mark = 1, 0, ","
    if text[skip_blanks(position + 1) : skip_blanks(position + 1) + 1] == "]":
        position, mark = skip_blanks(position + 1), "]"
    while mark == ",":
        position = skip_blanks(position + 1)
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decode(text, position)
        except json.JSONDecodeError as error:
            raise _not_json(f"{path}:{error.lineno}", error) from error
        except (ValueError, RecursionError) as error:
            raise _not_json(f"{path}:{line}", error) from error
        yield f"{path}:{line}", row
        position = skip_blanks(position)
        mark = text[position : position + 1]
    if mark != "]" or skip_blanks(position + 1) < len(text):
        line += text.count("\n", counted, position)
        expected = "a ',' or ']' after a row" if mark != "]" else "nothing after the list"
        raise DataError(f"{path}:{line}: not JSON: expected {expected}")


def _csv_rows(path: Path) -> PlacedRows:
    """A header and rows of texts; a row may span several lines, and its place is the first of them."""
    csv.field_size_limit(LONGEST_LINE)  # a cell may hold what a line may
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{line}: two columns have the same name")
            elif cells and len(cells) != len(header):
                raise DataError(f"{path}:{line}: {len(cells)} cells, but the header names {len(header)} columns")
            elif cells:
                yield f"{path}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from error


def _parquet_rows(path: Path) -> PlacedRows:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield from _table_rows(path, table.iter_batches(batch_size=BATCH_ROWS))
    except ArrowException as error:
        raise DataError(f"{path}: not a parquet file: {error}") from error


def _arrow_rows(path: Path) -> PlacedRows:
    """An Arrow stream, which the ``datasets`` library writes, or an Arrow file."""
    from pyarrow import ArrowException, ArrowInvalid, ipc, memory_map

    try:
        with memory_map(str(path)) as source:
            try:
                batches = iter(ipc.open_stream(source))
            except ArrowInvalid:
                table = ipc.open_file(source)
                batches = (table.get_batch(number) for number in range(table.num_record_batches))
            yield from _table_rows(path, batches)
    except ArrowException as error:
        raise DataError(f"{path}: not an Arrow file: {error}") from error


def _table_rows(path: Path, batches: Iterator[Any]) -> PlacedRows:
    decoders: dict[str, Decoder] | None = None
    number = 0
    for batch in batches:
        if decoders is None:
            decoders = json_decoders(batch.schema)
        for row in batch.to_pylist():
            number += 1
            place = f"{path}: row {number}"
            try:
                yield place, {**row, **{name: decode(row[name]) for name, decode in decoders.items()}}
            except ValueError as error:
                raise _not_json(place, error) from error


def json_decoders(schema: Any) -> dict[str, Decoder]:
    """What decodes the columns that hold JSON as text at any depth: by their Arrow type, or by what ``datasets`` says of them.

    The ``datasets`` library writes such columns where the values of a field differ in shape from row to row.
    """
    features = _described_features(schema)
    decoders = {field.name: _json_decoder(field.type, features.get(field.name)) for field in schema}
    return {name: decode for name, decode in decoders.items() if decode is not None}


def _described_features(schema: Any) -> Mapping[str, Any]:
    """What ``datasets`` wrote about the columns of a table; nothing where that was somebody else, or is not as it writes it."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _json_decoder(kind: Any, feature: Any) -> Decoder | None:
    """What decodes a value of an Arrow type that ``datasets`` describes by ``feature``; none where nothing in it is JSON."""
    from pyarrow import BaseExtensionType, types

    described = feature if isinstance(feature, dict) else {}
    of_json = isinstance(kind, BaseExtensionType) and kind.extension_name == "arrow.json"
    if of_json or described.get("_type") == "Json":
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_item = _json_decoder(kind.value_type, feature[0] if isinstance(feature, list) else described.get("feature"))
        return None if of_item is None else lambda value: None if value is None else [of_item(item) for item in value]
    if not types.is_struct(kind):
        return None
    decoders = {
        field.name: decode for field in kind if (decode := _json_decoder(field.type, described.get(field.name)))
    }

    def decode_fields(value: Any) -> Any:
        return value and {**value, **{name: decode(value[name]) for name, decode in decoders.items()}}

    return decode_fields if decoders else None


READERS: Mapping[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".json.gz": _json_rows,
    ".csv": _csv_rows,
    ".csv.gz": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
