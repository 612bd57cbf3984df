"""What a row must hold, and a look at the first rows of a data file before anything is started.

Always true: at most ``LIMIT`` rows are looked at, and each problem names file and line. A whole file is read, with its
tokens counted, by :mod:`rlhf_ray.data`, which refuses a row for the same reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError
from rlhf_ray.rows.conversations import is_conversation, text_problem
from rlhf_ray.rows.formats import raw_rows
from rlhf_ray.rows.layouts import Keys, LayoutError, read_pair, read_prompt_messages, read_tools

LIMIT = 100

PAIR_NUMBERS = ("margin", "grade")
"""Optional columns of preferences: one number a pair, which some losses read."""

Needs = Sequence[Sequence[str]]
"""Sets of keys; a row needs all keys of one of them."""


def row_problems(path: Path, needs: Needs = (), *, problem_of: Callable[[Any], str] | None = None) -> list[str]:
    """What is wrong with the first rows of ``path``; each message starts with the file (and the line).

    A row needs texts under all keys of one of the sets in ``needs``, or is as ``problem_of`` wants it.
    """
    problem_of = problem_of or partial(row_problem, needs=needs)
    count, bad = 0, []
    try:
        for count, (place, row) in enumerate(islice(raw_rows(path), LIMIT), 1):  # noqa: B007 (the count is what is wanted)
            wrong = problem_of(row)
            if wrong:
                bad.append(f"{place}: {wrong}")
    except DataError as error:
        bad.append(str(error))
    if not count and not bad:
        return [f"{path}: holds no rows"]
    return [f"{bad[0]}{f' ({len(bad)} of the first {count} rows are wrong)' if len(bad) > 1 else ''}"] if bad else []


def row_problem(row: Any, needs: Needs) -> str:
    """What is wrong with a row of texts; empty where it is fine."""
    problem = key_problem(row, needs)
    if problem:
        return problem
    present = [keys for keys in needs if all(key in row for key in keys)]
    wrong = {key: text_problem(row[key]) for keys in present[:1] for key in keys}
    return " and ".join(f"{key!r} must hold a text{problem}" for key, problem in wrong.items() if problem)


def pair_problem(row: Any, keys: Keys, *, turns: bool) -> str:
    """What is wrong with a row of preferences; empty where it is fine."""
    problem = key_problem(row, [keys[1:]])
    if problem:
        return problem
    try:
        read_pair(row, keys, turns=turns)
    except LayoutError as error:
        return str(error)
    return " and ".join(filter(None, (number_problem(row, key) for key in PAIR_NUMBERS)))


def number_problem(row: Mapping[str, Any], key: str) -> str:
    """Why there is no finite number under ``key``, not even as text; empty where there is one, or nothing at all."""
    value = row.get(key)
    if value in (None, ""):
        return ""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return ""
    shown = repr(value) if isinstance(value, int | float) else f"a {type(value).__name__} that is none"
    return f"{key!r} must hold a finite number, this is {shown}"


def prompt_problem(row: Any, keys: Keys, *, turns: bool) -> str:
    """What is wrong with a row that gives a prompt, under a key of its own or as the beginning of a pair."""
    problem = key_problem(row, [(keys.prompt,), keys[1:]])
    if problem:
        return problem
    try:
        if keys.prompt not in row:
            read_pair(row, keys)
        elif is_conversation(row[keys.prompt]) or turns:
            read_prompt_messages(row, keys.prompt)
            read_tools(row)
        else:
            return row_problem(row, [(keys.prompt,)])
    except LayoutError as error:
        return str(error)
    return ""


def key_problem(row: Any, needs: Needs) -> str:
    """What a row lacks of the keys that it needs; empty where it lacks nothing."""
    if not isinstance(row, dict):
        return f"a row is a mapping of keys to values, but this is a {type(row).__name__}"
    if needs and not any(all(key in row for key in keys) for keys in needs):
        missing = " or ".join(" and ".join(repr(key) for key in keys) for keys in needs)
        return f"no {missing}; its keys are {', '.join(map(repr, row))}"
    return ""
