"""The label of a prompt: which column holds it, and what a function that compares answers with it can read.

Invariants: a label is what one column of its row holds, named by the config or certain from the row; of two columns that hold
different values none is chosen; a number becomes text, and nothing else is changed; a label that a verifier cannot compare
with is refused with its row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from rlhf_ray.rows.row import LayoutError, Row

LABEL_COLUMNS = ("label", "answer", "solution", "ground_truth", "reward_model.ground_truth")
"""Columns of labels: ours, GSM8K's, TRL's, and verl's, where the last is a field of a mapping."""
FINAL = "####"
"""The mark before the final number of a worked answer (GSM8K, Cobbe et al. 2021, section 2)."""
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
FORMULA = re.compile(
    r"\\(?!boxed\b|text\b|mathrm\b)[A-Za-z]+|\d[A-Za-zπ]|[A-Za-z]-?\d|√\s*\d"
    r"|(?<=[\w)])\s*[\^_*/+]\s*\{?-?\d|\d\s*[\^_*/+]\s*[\w(]"
)
"""What makes another number of the one beside it: a command of LaTeX, a variable or unit, an operator."""
KEY = "name the column of the labels in data.label_key, as in data.label_key=solution"

Label = Any
"""A text, or what else a row holds: a list, a mapping, a truth value."""
Compared = Literal["", "text", "number"]
"""What a verifier takes from a label; empty where no verifier reads it."""


@dataclass(frozen=True)
class LabelReader:
    """Finds the label of a row, and refuses one that ``verifier`` cannot compare answers with."""

    key: str | None = None
    """The column, or a field in it (``reward_model.ground_truth``); none: the one of ``LABEL_COLUMNS`` that is filled."""
    compared: Compared = ""
    verifier: str = ""
    """The name of the function that compares, for messages."""
    used: bool = True
    """Whether any function may read labels; otherwise columns that disagree give no label."""

    def read(self, row: Row, other_columns: Collection[str] = ()) -> Label | None:
        """The label; none where the row has none. ``other_columns`` hold something else and are not looked at."""
        name, label = self._named(row, self.key) if self.key is not None else self._found(row, other_columns)
        if self.compared and (problem := self._problem(name, label, row)):
            raise LayoutError(*problem)
        return label

    def _named(self, row: Row, key: str) -> tuple[str, Label | None]:
        if key not in row.values and key.partition(".")[0] not in row.values:
            names = ", ".join(map(repr, row.values))
            raise LayoutError(f"no {key!r}, which data.label_key names; its keys are {names}", KEY)
        return key, as_label(field_of(row, key))

    def _found(self, row: Row, other_columns: Collection[str]) -> tuple[str, Label | None]:
        values = {name: as_label(field_of(row, name)) for name in LABEL_COLUMNS if name not in other_columns}
        filled = {name: value for name, value in values.items() if value is not None}
        if not filled:
            return "", None
        name, label = next(iter(filled.items()))
        others = [other for other, value in filled.items() if value != label]
        if others and not self.used:
            return "", None
        if others:
            both = " and ".join(map(repr, (name, *others)))
            raise LayoutError(f"{both} could each be the label, and they differ", KEY)
        return name, label

    def _problem(self, name: str, label: Label | None, row: Row) -> tuple[str, str] | None:
        compares = f"reward function {self.verifier} compares answers with it"
        if label is None:
            looked = repr(name) if name else ", ".join(map(repr, LABEL_COLUMNS))
            names = ", ".join(map(repr, row.values))
            return f"no label, but the {compares}: there is nothing under {looked}; its keys are {names}", KEY
        problem = text_label_problem(label) if self.compared == "text" else number_label_problem(label)
        way_out = f"{KEY}, mend the row, or verify with a function of your own, which is given labels as they are"
        return (f"the label under {name!r} {problem}, and the {compares}", way_out) if problem else None


def field_of(row: Row, key: str) -> Any:
    """What a row holds under ``key``, or else in the mappings that its parts between dots name; none where nothing is."""
    value: Any = row.values.get(key)
    if value is None and "." in key and key not in row.values:
        value = row.values
        for part in key.split("."):
            value = _as_mapping(value).get(part)
    return None if value == "" else value


def _as_mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, also where a table holds it as JSON; anything else has no fields."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def as_label(value: Any) -> Label | None:
    """A value as a label: a number as text, anything else as it is.

    A table writes 7 as 7.0, and nothing as NaN, where a column of numbers has empty cells.
    """
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def text_label_problem(label: Label) -> str:
    """Why answers cannot be compared with ``label`` as text; empty where they can."""
    if isinstance(label, str):
        return ""
    kind = "a truth value" if isinstance(label, bool) else f"of type {type(label).__name__}"
    return f"must be one text or number, this is {kind}"


def number_label_problem(label: Label) -> str:
    """Why answers cannot be compared with the number of ``label``; empty where they can."""
    if problem := text_label_problem(label):
        return problem
    _, mark, after = label.rpartition(FINAL)
    count = len(NUMBER.findall(after if mark else label))
    if mark and count:
        return ""
    if count == 1 and FORMULA.search(label) is None:
        return ""
    several = f"{count} numbers, so it is not certain which is meant"
    held = {0: "no number", 1: "a formula"}.get(count, several)
    return f"holds {held}: give the number alone, or after {FINAL}"


def final_number(text: str) -> Decimal | None:
    """The number that a worked answer ends with; none where it holds none. ``1,000``, ``$1000`` and ``1000.0`` are equal."""
    _, mark, after = text.rpartition(FINAL)
    numbers = NUMBER.findall(after if mark else text)
    if not numbers:
        return None
    written = numbers[0] if mark else numbers[-1]
    try:
        return Decimal(written.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
