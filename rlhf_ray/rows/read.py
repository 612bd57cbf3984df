"""Reading a data file row by row: ``check`` reads the first rows of a file, a job reads all of them, by the same reader.

Invariants: rows come in the order of the file, and each is read once; whatever is wrong ends in one :class:`DataError` that
begins with the file and the line and quotes no text, or, where the reader drops bad rows, in one warning that counts them and
names the first; ``check`` reads at most ``ROWS_CHECKED`` rows of a file (and the rest of the last prompt's, where several rows
make one) and refuses none that a job would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from rlhf_ray.console import get_logger
from rlhf_ray.errors import DataError
from rlhf_ray.rows.formats import PlacedRows
from rlhf_ray.rows.row import Columns, KeySets, LayoutError, Row, make_row
from rlhf_ray.rows.sources import AnySource, RowSource, as_source, placed_rows

ROWS_CHECKED = 100
BAD_ROWS_SHOWN = 5
"""How many of the rows that are dropped are named in the log."""
WAY_OUT = (
    "mend the row, set the keys of the data section to those of the file, or leave bad rows out with data.bad_rows=drop"
)

Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)


class Expanded(NamedTuple):
    """What rows of a file stand for: one row or several, in a form that the reader knows."""

    rows: Sequence[Any]
    layout: str = ""
    """The name of the layout that they were read as, where it is one of published data."""


class RowReader(Protocol[Value_co]):
    """What a kind of row needs, and what it becomes."""

    @property
    def columns(self) -> Columns:
        """Which columns are left out or have another name."""
        ...

    @property
    def drops_bad_rows(self) -> bool:
        """Whether a row that is wrong is left out and counted; else it ends the reading."""
        ...

    @property
    def needs(self) -> KeySets:
        """A row must have all keys of one of these sets."""
        ...

    @property
    def uniform(self) -> Sequence[str]:
        """Columns that must be filled in all rows of a file or in none, since no reading suits both."""
        ...

    def belong_together(self, one: Any, other: Any) -> bool:
        """Whether two rows, one after the other, are to be read as one."""
        ...

    def expand(self, rows: Sequence[Any]) -> Expanded:
        """What rows that belong together, mostly one, stand for; raises :class:`LayoutError`."""
        ...

    def read(self, row: Row) -> Value_co:
        """The value of a row that has the keys it needs; raises :class:`LayoutError` for one that is wrong."""
        ...


@dataclass(frozen=True)
class PlainReader:
    """What all readers of single rows have in common."""

    columns: Columns = field(default=Columns(), kw_only=True)
    drops_bad_rows: bool = field(default=False, kw_only=True)

    def belong_together(self, one: Any, other: Any) -> bool:
        """Every row stands for itself."""
        return False

    def expand(self, rows: Sequence[Any]) -> Expanded:
        """The row as it is."""
        return Expanded(rows)


@dataclass(frozen=True)
class AnyRow(PlainReader):
    """Reads a row as it is, with texts under all keys of the first set in ``needs`` that it has."""

    needs: KeySets = ()
    uniform: Sequence[str] = ()

    def read(self, row: Row) -> Row:
        """The row itself."""
        keys = next((keys for keys in self.needs if all(key in row.values for key in keys)), ())
        row.texts(keys)
        return row


class Outcome(NamedTuple):
    """What became of one row: its value, or what is wrong with it."""

    where: str
    value: Any
    """Of a row that is wrong, a :class:`LayoutError`."""
    layout: str = ""


def read_row(reader: RowReader[Value], row: Row) -> Value:
    """The value of one row, with nothing assumed about it."""
    row.require(reader.needs)
    return reader.read(row)


def read_rows(source: AnySource, needs: KeySets = (), *, max_rows: int | None = None) -> list[Row]:
    """All rows of a source as they are, each with texts under all keys of one of the sets in ``needs``."""
    return list(read_file(source, AnyRow(needs), max_rows=max_rows))


def read_file(
    source: AnySource, reader: RowReader[Value], *, max_rows: int | None = None, bad_rows: list[str] | None = None
) -> Iterator[Value]:
    """What the reader makes of each row of a file or data set, or of the first ``max_rows``; raises :class:`DataError`.

    Rows that the reader drops are added to ``bad_rows``, each with its place and what is wrong; without such a list they are
    reported in the log.
    """
    source = as_source(source)
    bad, count, layouts = [] if bad_rows is None else bad_rows, 0, set[str]()
    for outcome in _outcomes(source, reader, max_rows):
        if isinstance(outcome.value, LayoutError):
            problem, way_out = f"{outcome.where}: {outcome.value}", outcome.value.way_out
            if not reader.drops_bad_rows:
                raise DataError(f"{problem}: {way_out or WAY_OUT}") from outcome.value
            bad.append(problem)
            continue
        if outcome.layout not in layouts:
            layouts.add(outcome.layout)
            if outcome.layout:
                get_logger("data").info("%s: read as %s (docs/configuration.md)", source, outcome.layout)
        count += 1
        yield outcome.value
    if not count:
        if bad:
            raise DataError(f"{source}: all {len(bad)} rows are wrong, so none is left; the first: {bad[0]}")
        raise DataError(f"{source}: holds no rows, at least one was expected")
    if bad_rows is None:
        report_bad_rows(source, bad)


def report_bad_rows(source: RowSource, bad_rows: Sequence[str]) -> None:
    """Say in the log how many rows were dropped because they are wrong, and name the first of them."""
    if bad_rows:
        further = len(bad_rows) - BAD_ROWS_SHOWN
        shown = "; ".join(bad_rows[:BAD_ROWS_SHOWN]) + (f"; and {further} more" if further > 0 else "")
        get_logger("data").warning("%s: %d bad rows are left out (data.bad_rows): %s", source, len(bad_rows), shown)


def first_values(source: AnySource, reader: RowReader[Value], *, max_rows: int | None = None) -> list[Value]:
    """What the reader makes of the rows that ``check`` reads and that are right."""
    try:
        outcomes = list(_outcomes(as_source(source), reader, _rows_checked(max_rows)))
    except DataError:  # which first_problem tells
        return []
    return [outcome.value for outcome in outcomes if not isinstance(outcome.value, LayoutError)]


def _rows_checked(max_rows: int | None) -> int:
    """How many rows ``check`` reads of a file of which a job reads ``max_rows``."""
    return min(ROWS_CHECKED, max_rows or ROWS_CHECKED)


def first_problem(source: AnySource, reader: RowReader[Any], *, max_rows: int | None = None) -> str:
    """What is wrong with the first rows of a source: the first row that is, and how many are; empty where none is.

    Where bad rows are dropped, there is a problem only if all that the job reads are wrong.
    """
    source = as_source(source)
    problems, count = [], 0
    try:
        for outcome in _outcomes(source, reader, _rows_checked(max_rows)):
            count += 1
            if isinstance(outcome.value, LayoutError):
                problems.append(f"{outcome.where}: {outcome.value}: {outcome.value.way_out or WAY_OUT}")
    except DataError as error:
        return str(error) if reader.drops_bad_rows or not problems else problems[0]
    if not count:
        return f"{source}: holds no rows"
    seen_all = count < ROWS_CHECKED or (max_rows is not None and max_rows <= ROWS_CHECKED)
    if reader.drops_bad_rows and (len(problems) < count or not seen_all):
        return ""
    further = f" ({len(problems)} of the first {count} rows are wrong)" if len(problems) > 1 else ""
    return f"{problems[0]}{further}" if problems else ""


def _outcomes(source: RowSource, reader: RowReader[Any], max_rows: int | None) -> Iterator[Outcome]:
    uniform = _UniformColumns(reader.uniform)
    for number, (where, together) in enumerate(_joined_rows(source, reader, max_rows)):
        try:
            expanded = reader.expand(together)
        except LayoutError as error:
            yield Outcome(where, error)
            continue
        for values in expanded.rows:
            try:
                value = _read(reader, values, where, number, uniform)
            except LayoutError as error:
                problem = f"read as {expanded.layout}: {error}" if expanded.layout else str(error)
                yield Outcome(where, LayoutError(problem, error.way_out))
            except UnevenColumn as error:
                if not reader.drops_bad_rows:
                    raise
                yield Outcome(where, LayoutError(str(error)))
            else:
                yield Outcome(where, value, expanded.layout)


def _joined_rows(source: RowSource, reader: RowReader[Any], max_rows: int | None) -> Iterator[tuple[str, list[Any]]]:
    """The rows that belong together, with the place of the first; ``max_rows`` never cuts them apart."""
    where, together = "", list[Any]()
    for count, (place, row) in enumerate(_with_columns(placed_rows(source), reader.columns), 1):
        if together and reader.belong_together(together[-1], row):
            together.append(row)
        else:
            if together:
                yield where, together
            where, together = place, [row]
            if max_rows is not None and count > max_rows:
                return
        if count == max_rows and not reader.belong_together(row, row):  # no further row can belong to it
            break
    if together:
        yield where, together


def _with_columns(rows: PlacedRows, columns: Columns) -> PlacedRows:
    """The rows with their columns; those that should be renamed and that no row has are told at the end."""
    where, missing = "", {name for name, _ in columns.renamed}
    for where, values in rows:
        if missing and isinstance(values, Mapping):
            missing -= values.keys()
        yield where, columns.apply(values)
    if missing and where:
        names = ", ".join(map(repr, sorted(missing)))
        get_logger("data").warning("%s: no row up to here has %s, which data.rename_columns names", where, names)


def _read(reader: RowReader[Value], values: Any, where: str, number: int, uniform: _UniformColumns) -> Value:
    row = make_row(values, where, number)
    value = read_row(reader, row)
    uniform.compare(row)
    return value


class UnevenColumn(DataError):
    """A column is filled in some rows of a file only."""


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
                raise UnevenColumn(
                    f"{lacking.where}: nothing under {column!r}, but there is something in {having.where}: fill it in all "
                    "rows or none"
                )
