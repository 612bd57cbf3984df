"""A row may be long; a line without end costs no more memory than the longest row."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlhf_ray.errors import DataError
from rlhf_ray.rows import formats
from rlhf_ray.rows.formats import raw_rows

Write = Callable[..., Path]


def test_a_cell_of_a_table_may_be_as_long_as_a_line(write: Write) -> None:
    long = "x" * 200_000
    path = write(f"text,other\n{long},b\n", "rows.csv")
    try:
        (row,) = (row for _, row in raw_rows(path))
    except DataError as error:
        pytest.fail(str(error)[:200])
    assert row == {"text": long, "other": "b"}


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.csv.gz", "rows.json", "rows.json.gz"]
)
def test_a_line_without_end_is_told_before_it_is_read(write: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    content = b'["text"]\n' + b"[" + b" " * 5000 + b'"a"]\n' if "json" in name else b"text\n" + b"x" * 5000 + b"\n"
    path = write(gzip.compress(content) if name.endswith(".gz") else content, name)
    read: list[int] = []
    real = Path.open
    if not name.endswith(".gz"):
        monkeypatch.setattr(Path, "open", lambda self, *a, **o: _Counting(real(self, *a, **o), read))
    with pytest.raises(
        DataError, match=r"rows\..*:2: a line of more than \d+ MiB, which no row has: write one row a line"
    ):
        list(raw_rows(path))
    assert set(read) <= {1001}


class _Counting:
    """A file of which it is seen how much is asked for at a time."""

    def __init__(self, file: Any, sizes: list[int]) -> None:
        self.file, self.sizes = file, sizes

    def __enter__(self) -> _Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def readline(self, size: int = -1) -> bytes:
        self.sizes.append(size)
        return bytes(self.file.readline(size))


def test_a_list_without_end_is_told(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LIST", 1000)
    with pytest.raises(DataError, match=r"rows\.json: a list of more than .* write it as \.jsonl, one row a line"):
        list(raw_rows(write("[" + '"a",\n' * 500 + '"a"]', "rows.json")))


@pytest.mark.parametrize("about", [b"{", b"[1]", b'{"info": 5}', b'{"info": {"features": [1]}}', b"[" * 100_000])
def test_a_table_that_describes_itself_wrongly_is_read(tmp_path: Path, about: bytes) -> None:
    table = pyarrow.table({"text": ["a"]}).replace_schema_metadata({b"huggingface": about})
    parquet.write_table(table, tmp_path / "rows.parquet")
    try:
        assert [row for _, row in raw_rows(tmp_path / "rows.parquet")] == [{"text": "a"}]
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {str(error)[:100]}")
