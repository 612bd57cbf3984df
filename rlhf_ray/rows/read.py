"""Rows of a data file, whatever its format, each with the place it came from.

Always true: rows come in the order of the file; every row has the keys that were asked for, with what must stand
there; whatever is wrong ends in one :class:`DataError` that begins with the file and the line and quotes no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray.environment import is_hub_id
from rlhf_ray.errors import DataError
from rlhf_ray.rows.checks import Needs, number_problem, row_problem
from rlhf_ray.rows.conversations import text_problem
from rlhf_ray.rows.formats import raw_rows


@dataclass(frozen=True)
class Row:
    """One row and where it stands."""

    values: Mapping[str, Any]
    where: str

    def __contains__(self, key: str) -> bool:
        """Whether there is something under ``key``; an empty cell of a table is nothing."""
        return self.values.get(key) not in (None, "")

    def text(self, key: str) -> str:
        """The text under ``key``."""
        value = self.values.get(key)
        problem = text_problem(value)
        if problem:
            raise self.error(f"{key!r} must hold a text{problem}")
        return str(value)

    def number(self, key: str) -> float | None:
        """The finite number under ``key``, also as text; none where there is nothing."""
        problem = number_problem(self.values, key)
        if problem:
            raise self.error(problem)
        return float(self.values[key]) if key in self else None

    def short_text(self, key: str) -> str | None:
        """A text or number under ``key`` as text; none where there is nothing."""
        if key not in self:
            return None
        value = self.values[key]
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else self.text(key)

    def error(self, problem: str) -> DataError:
        """What is wrong with this row, to be raised."""
        return DataError(f"{self.where}: {problem}")


def read_rows(
    path: str | Path,
    needs: Needs = (),
    *,
    problem_of: Callable[[Any], str] | None = None,
    max_rows: int | None = None,
) -> list[Row]:
    """Every row of a file or of the folder of a saved data set, or the first ``max_rows`` of them.

    Each has texts under all keys of one of the sets in ``needs``, or is as ``problem_of`` wants it.
    """
    problem_of = problem_of or partial(row_problem, needs=needs)
    place = Path(path)
    if not place.exists():
        raise DataError(f"{path}: {_missing(str(path))}")
    rows = []
    for where, values in islice(raw_rows(place), max_rows):
        problem = problem_of(values)
        if problem:
            raise DataError(
                f"{where}: {problem}: mend the row, or set the keys of the data section to those of the file"
            )
        rows.append(Row(values, where))
    if not rows:
        raise DataError(f"{path}: holds no rows, at least one was expected")
    return rows


def is_in_all(rows: Sequence[Row], key: str) -> bool:
    """Whether every row has ``key``; raises where only some have it, since no reading suits both."""
    first = key in rows[0]
    for row in rows:
        if (key in row) != first:
            have, lack = (row, rows[0]) if not first else (rows[0], row)
            raise lack.error(
                f"nothing under {key!r}, but there is something in {have.where}: fill it in all rows or none"
            )
    return first


def _missing(path: str) -> str:
    if is_hub_id(path) and not Path(path).parent.is_dir():
        return (
            "no such file, and data sets of a hub are not downloaded here: save it once, with "
            f"datasets.load_dataset({path!r}, split='train').save_to_disk('rows'), and name that folder"
        )
    return "no such file or folder: name a data file, such as pairs.jsonl.gz"
