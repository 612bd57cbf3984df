"""Whatever is wrong with the files of ``score`` is told before Ray starts, and leaves nothing behind."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.loading import load_job
from rlhf_ray.errors import RequestError
from rlhf_ray.launch.score import Cluster, score

GOOD = '{"text": "a"}\n'


def begin(source: Path, target: Path) -> int:
    config = load_job(ServeConfig, "serve", ["reward.model.path=org/model", "run.name=score"])
    return score(config, source, target, truncate=False)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> Any:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(Cluster, "for_job", start)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"a", "not a format that is read here"),
        ("rows", b"a", "not a format that is read here"),
        ("rows.jsonl", GOOD.encode() * 700 + b"{", r"rows\.jsonl:701: not JSON"),
        ("rows.jsonl", GOOD.encode() + b"\xff", r"rows\.jsonl:2: not UTF-8"),
        ("rows.jsonl", GOOD.encode() + b"[1]", r"rows\.jsonl:2: a row must be an object"),
        ("rows.jsonl", GOOD.encode() + b'{"score": 1}', r"rows\.jsonl:2: there is a column 'score' already"),
        ("rows.jsonl", GOOD.encode() + b'{"text": "a", "x": -Infinity}', r"rows\.jsonl:2: 'x' holds the number -inf"),
        ("rows.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], r"rows\.jsonl\.gz: cannot be read"),
        ("rows.parquet", b"PAR1", "not a parquet file"),
        ("rows.csv", b"text,text\na,b\n", "two columns have the same name"),
        ("rows.json", b'{"text": "a"}', "a .json file is a list of rows"),
    ],
)
def test_an_input_that_is_wrong_anywhere_is_told_with_its_place(
    no_ray: None, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        begin(tmp_path / name, tmp_path / "deep/scores.jsonl")
    assert os.listdir(tmp_path) == [name]
    (tmp_path / "mended.jsonl").write_text(GOOD)
    with pytest.raises(AssertionError, match="Ray was started"):
        begin(tmp_path / "mended.jsonl", tmp_path / "deep/scores.jsonl")


def test_an_output_that_is_not_ours_is_told_first(no_ray: None, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("wrong too")
    with pytest.raises(RequestError, match="is a directory: name a file in it"):
        begin(tmp_path / "rows.txt", tmp_path)
    with pytest.raises(RequestError, match="is not a file: name a file of rows"):
        begin(tmp_path, tmp_path)
