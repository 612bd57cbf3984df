"""What a row must hold, and a look at the first rows of a data file before anything is started.

Always true: at most ``LIMIT`` rows are looked at, and each problem names file and line. A whole file is read, with its
tokens counted, by :mod:`rlhf_ray.data`, which refuses a row for the same reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray.config.formats import raw_rows
from rlhf_ray.errors import DataError

LIMIT = 100

Needs = Sequence[Sequence[str]]
"""Sets of keys; a row needs all keys of one of them."""


def row_problems(path: Path, needs: Needs) -> list[str]:
    """What is wrong with the first rows of ``path``; each message starts with the file (and the line)."""
    count, bad = 0, []
    try:
        for count, (place, row) in enumerate(islice(raw_rows(path), LIMIT), 1):  # noqa: B007 (the count is what is wanted)
            wrong = row_problem(row, needs)
            if wrong:
                bad.append(f"{place}: {wrong}")
    except DataError as error:
        bad.append(str(error))
    if not count and not bad:
        return [f"{path}: holds no rows"]
    return [f"{bad[0]}{f' ({len(bad)} of the first {count} rows are wrong)' if len(bad) > 1 else ''}"] if bad else []


def row_problem(row: Any, needs: Needs) -> str:
    """What is wrong with one row; empty where it is fine."""
    if not isinstance(row, dict):
        return f"a row is a mapping of keys to values, but this is a {type(row).__name__}"
    present = [keys for keys in needs if all(key in row for key in keys)]
    if needs and not present:
        missing = " or ".join(" and ".join(repr(key) for key in keys) for keys in needs)
        return f"no {missing}; its keys are {', '.join(map(repr, row))}"
    wrong = {key: text_problem(row[key]) for keys in present[:1] for key in keys}
    return " and ".join(f"{key!r} must hold a text{problem}" for key, problem in wrong.items() if problem)


def text_problem(value: Any) -> str:
    """Why ``value`` is no text that can be tokenized, to be put after "must hold a text"; empty where it is one."""
    if isinstance(value, list):
        return ", this is a list: write a conversation as one text, with its chat template applied"
    if not isinstance(value, str):
        return ", this is empty" if value is None else f", this is of type {type(value).__name__}"
    if not value:
        return ", this is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f", this has half a surrogate pair at character {error.start + 1}"
    return ""
