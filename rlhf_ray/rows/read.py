"""Reading a data file row by row: ``check`` reads the first rows of a file, a job reads all of them, by the same reader.

Invariants: rows come in the order of the file, and each is read once; whatever is wrong ends in one :class:`DataError` that
begins with the file and the line and quotes no text; ``check`` reads at most ``ROWS_CHECKED`` rows of a file and refuses
none that a job would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from rlhf_ray.errors import DataError
from rlhf_ray.rows.row import KeySets, LayoutError, Row, make_row
from rlhf_ray.rows.sources import AnySource, as_source, placed_rows

ROWS_CHECKED = 100
WAY_OUT = "mend the row, or set the keys of the data section to those of the file"

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)


class RowReader(Protocol[Value_co]):
    """What a kind of row needs, and what it becomes."""

    @property
    def needs(self) -> KeySets:
        """A row must have all keys of one of these sets."""
        ...

    @property
    def uniform(self) -> Sequence[str]:
        """Columns that must be filled in all rows of a file or in none, since no reading suits both."""
        ...

    def read(self, row: Row) -> Value_co:
        """The value of a row that has the keys it needs; raises :class:`LayoutError` for one that is wrong."""
        ...


@dataclass(frozen=True)
class AnyRow:
    """Reads a row as it is, with texts under all keys of the first set in ``needs`` that it has."""

    needs: KeySets = ()
    uniform: Sequence[str] = ()

    def read(self, row: Row) -> Row:
        """The row itself."""
        keys = next((keys for keys in self.needs if all(key in row.values for key in keys)), ())
        row.texts(keys)
        return row


def read_row(reader: RowReader[Value], row: Row) -> Value:
    """The value of one row, with nothing assumed about it."""
    row.require(reader.needs)
    return reader.read(row)


def read_rows(source: AnySource, needs: KeySets = (), *, max_rows: int | None = None) -> list[Row]:
    """All rows of a source as they are, each with texts under all keys of one of the sets in ``needs``."""
    return list(read_file(source, AnyRow(needs), max_rows=max_rows))


def read_file(source: AnySource, reader: RowReader[Value], *, max_rows: int | None = None) -> Iterator[Value]:
    """What the reader makes of each row of a file or data set, or of the first ``max_rows``; raises :class:`DataError`."""
    source = as_source(source)
    uniform, count = _UniformColumns(reader.uniform), 0
    for count, (where, values) in enumerate(islice(placed_rows(source), max_rows), 1):
        try:
            value = _read(reader, values, where, count - 1, uniform)
        except LayoutError as error:
            raise DataError(f"{where}: {error}: {error.way_out or WAY_OUT}") from error
        yield value
    if not count:
        raise DataError(f"{source}: holds no rows, at least one was expected")


def first_problem(source: AnySource, reader: RowReader[Any]) -> str:
    """What is wrong with the first rows of a source: the first row that is, and how many are; empty where none is."""
    source = as_source(source)
    uniform, count, problems = _UniformColumns(reader.uniform), 0, []
    try:
        for count, (where, values) in enumerate(islice(placed_rows(source), ROWS_CHECKED), 1):
            try:
                _read(reader, values, where, count - 1, uniform)
            except LayoutError as error:
                problems.append(": ".join(filter(None, (where, str(error), error.way_out))))
    except DataError as error:
        problems.append(str(error))
    if not problems:
        return "" if count else f"{source}: holds no rows"
    return problems[0] + (f" ({len(problems)} of the first {count} rows are wrong)" if len(problems) > 1 else "")


def _read(reader: RowReader[Value], values: Any, where: str, number: int, uniform: _UniformColumns) -> Value:
    row = make_row(values, where, number)
    value = read_row(reader, row)
    uniform.compare(row)
    return value


class _UniformColumns:
    """Compares each row with the first one: a column is filled in both or in neither."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self.first: Row | None = None

    def compare(self, row: Row) -> None:
        first = self.first = self.first or row
        for column in self.columns:
            if (column in row) != (column in first):
                having, lacking = (row, first) if column in row else (first, row)
                raise DataError(
                    f"{lacking.where}: nothing under {column!r}, but there is something in {having.where}: fill it in all "
                    "rows or none"
                )
