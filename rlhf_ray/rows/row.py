"""One row of a data file, and how values are taken from it.

Invariants: whatever is wrong with a row is one :class:`LayoutError`, which names the key and what was expected and never
quotes the row's text; an empty cell of a table counts as nothing, and a column that is left out as if the file did not have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.rows.conversations import text_problem

KeySets = Sequence[Sequence[str]]
"""Sets of keys; a row must have all keys of one of them."""


class LayoutError(ValueError):
    """What is wrong with a row, without the place where it stands; ``way_out`` says what to do, where that is special."""

    def __init__(self, problem: str, way_out: str = "") -> None:
        super().__init__(problem)
        self.way_out = way_out


@dataclass(frozen=True)
class Columns:
    """What a config says about columns: those to leave out, and other names for some."""

    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    """Names in the file, each with the name that it is read under."""

    def apply(self, values: Any) -> Any:
        """The row with these columns; one that is renamed wins over one that has the name. What is no row stays as it is."""
        if not isinstance(values, Mapping) or not (self.ignored or self.renamed):
            return values
        names = dict(self.renamed)
        kept = {name: value for name, value in values.items() if name not in self.ignored and name not in names}
        return kept | {new: values[name] for name, new in self.renamed if name in values}


@dataclass(frozen=True, slots=True)
class Row:
    """The values of one row, the place where it stands, and its number in the file, from 0."""

    values: Mapping[str, Any]
    where: str
    """``file:line``, or ``file: row n`` in tables."""
    number: int = 0

    def __contains__(self, key: str) -> bool:
        """Whether there is something under ``key``."""
        return is_filled(self.values, key)

    def require(self, key_sets: KeySets) -> None:
        """Refuse a row unless it has all keys of one of ``key_sets``; without sets nothing is required."""
        if key_sets and not any(all(key in self.values for key in keys) for keys in key_sets):
            missing = " or ".join(" and ".join(repr(key) for key in keys) for keys in key_sets)
            raise LayoutError(f"no {missing}; its keys are {', '.join(map(repr, self.values))}")

    def text(self, key: str) -> str:
        """The text under ``key``."""
        return self.texts((key,))[0]

    def texts(self, keys: Sequence[str]) -> list[str]:
        """The texts under ``keys``; every key without one is named."""
        problems = [(key, text_problem(self.values.get(key))) for key in keys]
        _refuse([f"{key!r} must hold a text{problem}" for key, problem in problems if problem])
        return [str(self.values[key]) for key in keys]

    def numbers(self, keys: Sequence[str]) -> list[float | None]:
        """The finite numbers under ``keys``, also where they are written as text; none where there is nothing."""
        _refuse(
            [problem for key in keys if (problem := self._number_problem(key))],
            "name a column that is something else in data.ignore_columns, or the right one in data.rename_columns",
        )
        return [float(self.values[key]) if key in self else None for key in keys]

    def short_text(self, key: str) -> str | None:
        """The text or number under ``key`` as text; none where there is nothing."""
        if key not in self:
            return None
        value = self.values[key]
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else self.text(key)

    def _number_problem(self, key: str) -> str:
        if key not in self:
            return ""
        value = self.values[key]
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return ""
        # A number may be repeated in the message, a text of the row may not.
        description = repr(value) if isinstance(value, int | float) else f"a {type(value).__name__} that is none"
        return f"{key!r} must hold a finite number, this is {description}"


def make_row(values: Any, where: str, number: int = 0) -> Row:
    """Make a row of what a file holds in one place; refused if that is not a mapping."""
    if not isinstance(values, Mapping):
        raise LayoutError(f"a row is a mapping of keys to values, but this is a {type(values).__name__}")
    return Row(values, where, number)


def is_filled(values: Mapping[str, Any], key: str) -> bool:
    """Whether there is something under ``key``; an empty cell of a table is nothing."""
    return values.get(key) not in (None, "")


def _refuse(problems: Sequence[str], way_out: str = "") -> None:
    if problems:
        raise LayoutError(" and ".join(problems), way_out)
