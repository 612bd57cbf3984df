"""One line for each row, in order, with its own columns and its score or error; what was interrupted goes on where the last
whole line ends, over the same input only; a finished file is never written over.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlhf_ray.errors import DataError, GroupError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.offline import AHEAD, check_rows, input_identity, line_of, row_item, score_file
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.storage.growing import GrowingFile

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
ROWS: list[dict[str, Any]] = [
    {"text": "abc", "mine": 1},
    {"prompt": "a", "response": "bcde", "mine": None},
    {"mine": "nothing to score"},
    {"messages": TURNS},
    {"token_ids": [1, 2]},
    {"token_ids": ["x"]},
    {"text": "ünï"},
]
SCORES = [3.0, 5.0, None, 3.0, 2.0, None, 3.0]


class Lengths:
    """Scores an item as its length; dies at its ``dies``-th call."""

    def __init__(self, dies: int | None = None) -> None:
        self.calls, self.dies, self.pending, self.most = 0, dies, 0, 0

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        self.calls += 1
        self.pending += 1
        self.most = max(self.most, self.pending)
        call = self.calls

        def wait() -> list[ScoreResult]:
            self.pending -= 1
            if call == self.dies:
                raise GroupError("reward", 0, "score", "its process died")
            return [ScoreResult.of(float(self._length(request))) for request in requests]

        return Pending(wait)

    def _length(self, request: ScoreRequest) -> int:
        if request.token_ids is not None:
            return len(request.token_ids)
        texts = [turn["content"] for turn in request.messages] if request.messages else [t for _, t in request.texts()]
        return sum(map(len, texts))


def write(path: Path, rows: Sequence[Any]) -> Path:
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def run(source: Path, target: Path, scorer: Lengths, *, chunk: int = 2, **about: Any) -> int:
    return score_file(source, GrowingFile(target, {**input_identity(source), **about}), scorer, chunk=chunk).rows


def outcome(act: Callable[[], Any]) -> Any:
    """What a call returns or raises."""
    try:
        return act()
    except Exception as error:
        return error


def scores(target: Path) -> list[float | None]:
    return [json.loads(line)["score"]["raw"] for line in target.read_text().splitlines()]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_every_row_has_its_line_with_its_columns_and_its_score(tmp_path: Path, name: str, chunk: int) -> None:
    target = tmp_path / "out" / "scores.jsonl"
    scorer = Lengths()
    assert run(write(tmp_path / name, ROWS), target, scorer, chunk=chunk) == 2
    assert scores(target) == SCORES
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "score"} for line in lines] == ROWS
    assert [bool(line["score"]["error"]) for line in lines] == [score is None for score in SCORES]
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert scorer.most <= AHEAD


@pytest.mark.parametrize("dies", [1, 2, 3])
@pytest.mark.parametrize("torn", [0, 1, 20])
def test_what_was_interrupted_goes_on_after_its_last_whole_line(tmp_path: Path, dies: int, torn: int) -> None:
    source, target = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "scores.jsonl"
    with pytest.raises(GroupError):
        run(source, target, Lengths(dies))
    before = target.read_bytes() if target.exists() else b""
    if before:
        target.write_bytes(before[: max(len(before) - torn, 0)])
    whole = before[: max(len(before) - torn, 0)].count(b"\n")
    again = Lengths()
    run(source, target, again)
    assert scores(target) == SCORES
    assert again.calls <= -(-(len(ROWS) - whole) // 2), "what was scored is not scored again"


def test_another_input_or_model_does_not_go_on(tmp_path: Path) -> None:
    source, target = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "scores.jsonl"
    with pytest.raises(GroupError):
        run(source, target, Lengths(2), model="one")
    with pytest.raises(RequestError, match="was begun with another input, model or limit"):
        run(source, target, Lengths(), model="two")
    with pytest.raises(RequestError, match="was begun with another"):
        run(write(source, ROWS[1:]), target, Lengths(), model="one")


def test_a_finished_file_is_not_written_over(tmp_path: Path) -> None:
    source, target = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "scores.jsonl"
    run(source, target, Lengths())
    kept = target.read_bytes()
    with pytest.raises(RequestError, match="exists and is finished"):
        run(source, target, Lengths())
    assert target.read_bytes() == kept


@pytest.mark.parametrize(
    ("rows", "message"), [([{"text": "a", "score": 1}], "rename it"), ([[1]], "must be an object")]
)
def test_rows_that_cannot_be_read_are_told_with_their_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "a"}, *rows])
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{message}"):
        run(source, tmp_path / "scores.jsonl", Lengths())


def test_rows_without_a_score_are_told_by_their_number_in_the_file(tmp_path: Path) -> None:
    source, target = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "scores.jsonl"
    failed = score_file(source, GrowingFile(target, input_identity(source)), Lengths(), chunk=2)
    assert failed.rows == 2 and failed.first.startswith("row 3: give exactly one of ")
    target.unlink()
    with pytest.raises(GroupError):
        score_file(source, GrowingFile(target, input_identity(source)), Lengths(3), chunk=2)
    again = GrowingFile(target, input_identity(source))
    assert 0 < again.done < 6
    rest = score_file(source, again, Lengths(), chunk=2)
    assert rest.rows == 1 and rest.first.startswith("row 6: 'token_ids'"), "those before are not counted anew"


def test_an_input_that_was_mended_before_the_first_line_is_taken(tmp_path: Path) -> None:
    source, target = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "deep/scores.jsonl"
    with pytest.raises(GroupError):
        run(source, target, Lengths(1))
    assert not target.parent.exists(), "nothing was scored, so nothing is left"
    (tmp_path / "deep").mkdir()
    target.touch()
    (tmp_path / "deep/scores.jsonl.unfinished").write_text('{"input": "another", "writer": "process 1 on vm"}')
    assert outcome(lambda: run(source, target, Lengths())) == 2
    assert scores(target) == SCORES


ODD: dict[str, tuple[Any, Any]] = {
    "no number": (math.nan, None),
    "no number, deep": ([{"a": math.nan}], [{"a": None}]),
    "a date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "a moment": (datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006"),
    "a time": (datetime.time(3, 4), "03:04:00"),
    "an exact number": (decimal.Decimal("1.10"), "1.10"),
    "half a pair": ("a\ud83d", "a\ud83d"),
    "half a pair as a key": ({"\ud83d": 1}, {"\ud83d": 1}),
    "a large number": (10**30, 10**30),
    "pairs of a map": ([("a", 1.5)], [["a", 1.5]]),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_column_that_json_writes_otherwise_costs_no_score(tmp_path: Path, odd: str) -> None:
    value, written = ODD[odd]
    line = outcome(lambda: line_of({"text": "abc", "ü": "ü", "mine": value}, ScoreResult.of(3.0)))
    assert isinstance(line, str)
    assert json.loads(line) | {"score": None} == {"text": "abc", "ü": "ü", "mine": written, "score": None}
    assert "\n" not in line and line.encode()
    assert json.loads(line)["score"]["raw"] == 3.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"raw", "a value of type bytes"),
        ([{"a": b"raw"}], "a value of type bytes"),
        (math.inf, "the number inf"),
        (-math.inf, "the number -inf"),
        (datetime.timedelta(1), "a value of type timedelta"),
        (json.loads("[" * 400 + "]" * 400), None),
    ],
)
def test_a_column_that_no_line_can_hold_is_told_with_its_row_before_anything_is_scored(
    tmp_path: Path, value: Any, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("rows.parquet: row 1", {"text": "a"}), ("rows.parquet: row 2", {"text": "b", "mine": value})]
    monkeypatch.setattr("rlhf_ray.rewards.offline.raw_rows", lambda path: iter(rows))
    if message is None:
        assert outcome(lambda: check_rows(tmp_path / "rows.parquet")) is None
        return
    told = outcome(lambda: check_rows(tmp_path / "rows.parquet"))
    assert isinstance(told, DataError)
    assert f"row 2: 'mine' holds {message}, which" in str(told) and str(told).endswith(
        "column out, or write it as text"
    )


def test_tables_with_odd_columns_are_scored_or_refused_by_row(tmp_path: Path) -> None:
    odd = {"text": ["a", "bb"], "when": [datetime.datetime(2026, 1, 2)] * 2, "share": [math.nan, 0.5]}
    for name, column in (("good", [decimal.Decimal("1.5")] * 2), ("bad", [None, b"raw"])):
        parquet.write_table(pyarrow.table({**odd, "mine": column}), tmp_path / f"{name}.parquet")
    assert outcome(lambda: check_rows(tmp_path / "good.parquet")) is None
    run(tmp_path / "good.parquet", tmp_path / "scores.jsonl", Lengths())
    assert scores(tmp_path / "scores.jsonl") == [1.0, 2.0]
    with pytest.raises(DataError, match=r"bad\.parquet: row 2: 'mine' holds a value of type bytes"):
        check_rows(tmp_path / "bad.parquet")


def test_a_missing_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a file"):
        input_identity(tmp_path / "absent")


def test_a_row_asks_as_an_item_of_the_service_does() -> None:
    assert row_item({"text": "a", "prompt": None, "other": 1}, truncate=True) == ScoreRequest(text="a", truncate=True)
    both = row_item({"text": "a", "token_ids": [1]})
    assert isinstance(both, ScoreResult) and "exactly one of" in str(both.error)
