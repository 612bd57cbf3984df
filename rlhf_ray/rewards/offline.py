"""Scores the rows of a file into another file.

Invariants: the output holds one line per row of the input, in the same order, with the row's own columns and its score or
error; an interrupted run goes on after the last whole line, and only over the same input with the same model; a finished file
is never written over.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
from rlhf_ray.storage import storage_errors, write_file

SCORE = "score"
"""The name of the column that is added to each row."""
COLUMNS = ("token_ids", "text", "messages", "prompt", "response")
TEXTS, PAIR = ("text", "prompt", "response"), {"prompt", "response"}
AHEAD = 2
"""How many chunks the model has at a time, so that it never waits for the file."""


class Output:
    """A file of scores that grows line by line; until it is finished, a file beside it says which input and model it is of."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._about = path.with_name(path.name + ".unfinished")
        self._identity = json.dumps(identity, sort_keys=True)
        self.done = self._lines_already_there()

    def _lines_already_there(self) -> int:
        """The whole lines of a run that was interrupted, without the torn one after them."""
        if not self._about.exists():
            if self.path.exists():
                raise RequestError(f"{self.path} exists and is finished: remove it, or give another --output")
            return 0
        if self._about.read_text("utf-8") != self._identity:
            raise RequestError(
                f"{self.path} was begun with another input, model or limit ({self._about.name} says which): give the same "
                "again to go on with it, or remove both files"
            )
        if not self.path.exists():
            return 0
        with storage_errors(self.path), self.path.open("r+b") as file:
            lines, whole = 0, 0
            for line in file:
                if line.endswith(b"\n"):
                    lines, whole = lines + 1, whole + len(line)
            file.truncate(whole)
        return lines

    def __enter__(self) -> Output:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._about, self._identity)
            self._file: BinaryIO = self.path.open("ab")
        return self

    def write(self, rows: Sequence[Mapping[str, Any]], results: Sequence[ScoreResult]) -> None:
        """Add one line per row; they are on disk when this returns."""
        lines = [
            json.dumps({**row, SCORE: asdict(result)}, ensure_ascii=False, allow_nan=False)
            for row, result in zip(rows, results, strict=True)
        ]
        with storage_errors(self.path):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Mark the file as finished."""
        with storage_errors(self.path):
            self._about.unlink()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def input_identity(path: Path) -> Mapping[str, Any]:
    """What tells one input file from another: its hash and size."""
    if not path.is_file():
        raise RequestError(f"{path} is not a file: name a file of rows, such as items.jsonl")
    with path.open("rb") as file:
        return {"input": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


class Failures(NamedTuple):
    """Rows without a score: how many there are, and the number of the first, from 1, with its error."""

    rows: int = 0
    first: str = ""


def score_file(source: Path, output: Output, scorer: Scorer, *, chunk: int, truncate: bool = False) -> Failures:
    """Score the rows of ``source`` that the output lacks, ``chunk`` at a time; returns which of them have an error."""
    count, first, done = 0, "", output.done
    with output:
        rows = islice(_rows(source), output.done, None)
        for chunk_rows, results in _ahead(rows, scorer, chunk, truncate):
            output.write(chunk_rows, results)
            errors = [
                f"row {done + place}: {one.error}" for place, one in enumerate(results, 1) if one.error is not None
            ]
            count, first, done = count + len(errors), first or next(iter(errors), ""), done + len(results)
    output.finish()
    return Failures(count, first)


def _rows(source: Path) -> Iterator[Mapping[str, Any]]:
    for where, row in progress(raw_rows(source), "rows read"):
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a row must be an object with columns, not {type(row).__name__}")
        if SCORE in row:
            raise DataError(f"{where}: there is a column {SCORE!r} already, where the score is to stand: rename it")
        yield row


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
