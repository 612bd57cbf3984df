"""Scores the rows of a file into another file.

Invariants: the output holds one line per row of the input, in the same order, with the row's own columns and its score or
error; a row that no line can hold is refused by its place, before anything is scored.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import operator
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ray.console import progress
from rlhf_ray.errors import DataError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import DEEPEST, ScoreRequest, ScoreResult, depth_exceeds
from rlhf_ray.rewards.source import Scorer
from rlhf_ray.rows.formats import raw_rows
from rlhf_ray.rows.layouts import (
    SYSTEM,
    TOOLS,
    holds_messages,
    read_answered_messages,
    read_tools,
    read_variables,
)
from rlhf_ray.rows.row import LayoutError, is_filled
from rlhf_ray.rows.template_variables import CHAT_TEMPLATE_KWARGS
from rlhf_ray.storage.failures import storage_errors
from rlhf_ray.storage.growing import GrowingFile

SCORE = "score"
"""The name of the column that is added to each row."""
COLUMNS = ("token_ids", "text", "messages", "prompt", "response")
TEXTS, PAIR = ("text", "prompt", "response"), {"prompt", "response"}
AHEAD = 2
"""How many chunks the model has at a time, so that it never waits for the file."""


def input_identity(path: Path) -> Mapping[str, Any]:
    """What tells one input file from another: its hash and size."""
    if not path.is_file():
        raise RequestError(f"{path} is not a file: name a file of rows, such as items.jsonl")
    with storage_errors(path, "read"), path.open("rb") as file:
        return {"input": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


class Failures(NamedTuple):
    """Rows without a score: how many there are, and the number of the first, from 1, with its error."""

    rows: int = 0
    first: str = ""


def score_file(source: Path, output: GrowingFile, scorer: Scorer, *, chunk: int, truncate: bool = False) -> Failures:
    """Score the rows of ``source`` that the output lacks, ``chunk`` at a time; returns which of them have an error."""
    count, first, done = 0, "", output.done
    with output:
        rows = islice(_rows(source), output.done, None)
        for chunk_rows, results in _ahead(rows, scorer, chunk, truncate):
            output.extend([line_of(row, result) for row, result in zip(chunk_rows, results, strict=True)])
            errors = [
                f"row {done + place}: {one.error}" for place, one in enumerate(results, 1) if one.error is not None
            ]
            count, first, done = count + len(errors), first or next(iter(errors), ""), done + len(results)
        output.finish()
    return Failures(count, first)


def check_rows(source: Path) -> None:
    """Read all rows, and raise :class:`DataError` with the place of the first that cannot be read or has no line."""
    for where, row in _placed_rows(source):
        try:
            line_of(row, ScoreResult.failed("not scored yet"))
        except LayoutError as error:
            raise DataError(f"{where}: {error}: {error.way_out}") from error


def line_of(row: Mapping[str, Any], result: ScoreResult) -> str:
    """The line of a row: its own columns, as far as JSON has them, and its score.

    Dates and times are written as ISO 8601 has them, exact decimals as texts, and no number (NaN) as null. What JSON has no
    form for (bytes, infinities) raises :class:`LayoutError`.
    """
    score = asdict(result)
    try:
        line = json.dumps({**row, SCORE: score}, ensure_ascii=False, allow_nan=False)
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only its escape can stand for
        return json.dumps({**row, SCORE: score}, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        plain = {name: _column(name, value) for name, value in row.items()}
        return json.dumps({**plain, SCORE: score}, allow_nan=False)
    return line


def _column(name: str, value: Any) -> Any:
    try:
        return _plain_value(value)
    except (LayoutError, RecursionError) as error:
        what = str(error) if isinstance(error, LayoutError) else "lists within lists without end"
        raise LayoutError(
            f"{name!r} holds {what}, which no line of JSON can hold", "leave the column out, or write it as text"
        ) from error


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise LayoutError(f"the number {value}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise LayoutError(f"a value of type {type(value).__name__}")


def _rows(source: Path) -> Iterator[Mapping[str, Any]]:
    return (row for _, row in _placed_rows(source))


def _placed_rows(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, row in progress(raw_rows(source), "rows read"):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row must be an object with columns, not {type(row).__name__}")
        if SCORE in row:
            raise DataError(f"{where}: there is a column {SCORE!r} already, where the score is to stand: rename it")
        yield where, row


def _ahead(
    rows: Iterator[Mapping[str, Any]], scorer: Scorer, chunk: int, truncate: bool
) -> Iterator[tuple[tuple[Mapping[str, Any], ...], list[ScoreResult]]]:
    """Chunks with their results, in order; the next ones are being scored meanwhile."""
    waiting: deque[tuple[tuple[Mapping[str, Any], ...], Pending[list[ScoreResult]]]] = deque()
    while chunk_rows := tuple(islice(rows, chunk)):
        waiting.append((chunk_rows, score_rows(chunk_rows, scorer, truncate=truncate)))
        if len(waiting) >= AHEAD:
            done, pending = waiting.popleft()
            yield done, pending.result()
    while waiting:
        done, pending = waiting.popleft()
        yield done, pending.result()


def score_rows(rows: Sequence[Mapping[str, Any]], scorer: Scorer, *, truncate: bool) -> Pending[list[ScoreResult]]:
    """One result for every row, in order; a row that asks for nothing that can be scored has a failed one."""
    items = [row_item(plain_row(row), truncate=truncate) for row in rows]
    requests = [item for item in items if isinstance(item, ScoreRequest)]

    def in_order(results: list[ScoreResult]) -> list[ScoreResult]:
        scored = iter(results)
        return [next(scored) if isinstance(item, ScoreRequest) else item for item in items]

    return scorer.score(requests).then(in_order) if requests else Pending.done(in_order([]))


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with lists and numbers of Python where a table of NumPy holds its own."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


def row_item(row: Mapping[str, Any], *, truncate: bool = False) -> ScoreRequest | ScoreResult:
    """The request of a row, by the columns of ``/v1/reward``'s items; conversations are read as training reads them.

    A row that holds none of these, or one that training would refuse, has a failed result.
    """
    if depth_exceeds(row, DEEPEST):
        return ScoreResult.failed(f"the row is nested deeper than {DEEPEST} levels: write it flatter")
    try:
        return ScoreRequest(**_fields(row), truncate=truncate)
    except LayoutError as error:
        return ScoreResult.failed(": ".join(filter(None, (str(error), error.way_out))))
    except RequestError as error:
        return ScoreResult.failed(str(error))


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request of a row. An empty cell is nothing, except that an empty text can be scored."""
    names = {name for name in COLUMNS if is_filled(row, name)} or {name for name in TEXTS if row.get(name) == ""}
    if names & PAIR:
        names |= {name for name in PAIR if row.get(name) == ""}
    if len(names - {"response"}) != 1 or bool(names & PAIR) != (names >= PAIR):
        return {name: row[name] for name in names}  # the request says what is wrong with it
    if "token_ids" in names:
        return {"token_ids": _token_ids(row["token_ids"])}
    variables = read_variables(row)
    texts = {name: row[name] for name in names if isinstance(row[name], str) and not holds_messages(row[name])}
    if "text" in names:
        beside = next((name for name in (SYSTEM, TOOLS) if is_filled(row, name)), None)
        if beside is not None:
            raise LayoutError(f"there is something under {beside!r}, for which a text has no place", "give messages")
        return _as_texts(row, names)
    if texts.keys() == PAIR and not any(is_filled(row, name) for name in (SYSTEM, TOOLS)):
        return {**texts, CHAT_TEMPLATE_KWARGS: variables}
    key, answer_key = ("prompt", "response") if names == PAIR else ("messages", None)
    tools = read_tools(row)
    messages = read_answered_messages(row, key, answer_key)
    return {"messages": messages, "tools": None if tools is None else tuple(tools), CHAT_TEMPLATE_KWARGS: variables}


def _as_texts(row: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    for name in names:
        if not isinstance(row[name], str):
            raise LayoutError(f"{name!r} must hold a text, this is of type {type(row[name]).__name__}")
    return {name: row[name] for name in names}


def _token_ids(ids: Any) -> tuple[int, ...]:
    try:
        if any(isinstance(one, bool) for one in ids):
            raise TypeError("a truth value is no id")
        return tuple(map(operator.index, ids))
    except TypeError as error:
        raise LayoutError("'token_ids' must hold a list of whole numbers") from error
