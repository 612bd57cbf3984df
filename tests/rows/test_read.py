"""Rows come in the order of the file, with the keys that were asked for; what is wrong is told by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.data.load import load_pairs, load_prompts
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import DataError
from rlhf_ray.rows import preferences, prompts
from rlhf_ray.rows.layouts import read_pair
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.read import ROWS_CHECKED, AnyRow, first_problem, read_file, read_rows
from rlhf_ray.rows.row import LayoutError

ROWS = [{"prompt": "Wie geht's?\n", "answer": 'gut, "sehr"'}, {"prompt": "e\u0301\u2028\x85x", "answer": "b\r\nc"}]


def as_csv(rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_arrow(path, rows, make=pyarrow.ipc.new_stream):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)


def write_as(path, rows):
    """Write rows in the format that the name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
        return
    if name.endswith(".arrow"):
        as_arrow(path, rows, pyarrow.ipc.new_file if "file" in name else pyarrow.ipc.new_stream)
        return
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        content = as_csv(rows) if name.endswith(".csv") else json.dumps(rows, indent=1, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


FORMATS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    write_as(path, ROWS * 2)
    rows = read_rows(path, [("prompt", "answer")])
    assert [dict(row.values) for row in rows] == ROWS * 2
    assert first_problem(path, AnyRow([("prompt", "answer")])) == ""
    assert all(row.where.startswith(f"{path}:") for row in rows)
    assert len({row.where for row in rows}) == 4


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_the_place_of_a_row_is_the_line_where_it_begins(tmp_path, suffix, texts):
    """Whatever is in a row, a reader who goes to its line finds it."""
    path = tmp_path / f"rows.{suffix}"
    rows = [{"mark": f"row{number}.", "text": text} for number, text in enumerate(texts)]
    if suffix == "json":
        path.write_text("[\n\n" + ",\n\n".join(json.dumps(row) for row in rows) + "]", encoding="utf-8")
    else:
        write_as(path, rows)
    read = read_rows(path)
    assert [dict(row.values) for row in read] == rows
    lines = path.read_bytes().split(b"\n")
    for number, row in enumerate(read):
        assert f"row{number}.".encode() in lines[int(row.where.rpartition(":")[2]) - 1]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', ":2: not JSON: Expecting value at column"),
        ("rows.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', ":2: not UTF-8: invalid start byte at byte 8"),
        ("rows.jsonl", "[" * 200_000, ":1: not JSON: "),
        ("rows.jsonl", '{"a": ' + "9" * 5000 + "}", ":1: not JSON: "),
        ("rows.jsonl", '{"a": 1}\n"text"\n', ":2: a row is a mapping of keys to values, but this is a str"),
        ("rows.jsonl", '{"a": "x"}{"a": "y"}', ":1: not JSON: Extra data at column 11"),
        ("rows.jsonl", "", ": holds no rows"),
        ("rows.jsonl", "\n \n", ": holds no rows"),
        ("rows.jsonl.gz", b"no gzip", ": cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-20], ": cannot be read: "),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 99, ": cannot be read: "),
        ("rows.json", "", ":1: a .json file is a list of rows"),
        ("rows.json", "[]", ": holds no rows"),
        ("rows.json", " [ ] ", ": holds no rows"),
        ("rows.json", '[{"a": 1},\n{"a": }]', ":2: not JSON: "),
        ("rows.json", '[{"a": 1},\n{"a": 2}', ":2: not JSON: expected a ',' or ']' after a row"),
        ("rows.json", '[{"a": 1}\n{"a": 2}]', ":2: not JSON: expected a ',' or ']' after a row"),
        ("rows.json", '[{"a": 1}]\n[]', ":1: not JSON: expected nothing after the list"),
        ("rows.json", '[{"a": 1},]', ":1: not JSON: "),
        ("rows.json", '[{"a": 1},\n3]', ":2: a row is a mapping of keys to values, but this is a int"),
        ("rows.csv", "a,b\n1,2\n3\n", ":3: 1 cells, but the header names 2 columns"),
        ("rows.csv", "a,b\n1,2,3\n", ":2: 3 cells, but the header names 2 columns"),
        ("rows.csv", "a,a\n1,2\n", ":1: two columns have the same name"),
        ("rows.csv", 'a,b\n1,"2\n', ":2: not CSV: "),
        ("rows.csv", "a,b\n", ": holds no rows"),
        ("rows.csv", "", ": holds no rows"),
        ("rows.parquet", b"PAR1 no PAR1", ": not a parquet file: "),
        ("rows.arrow", b"no arrow", ": not an Arrow file: "),
        ("rows.txt", "text", ": not a format that is read here: .jsonl, "),
        ("rows.parquet.gz", b"", ": not a format that is read here: "),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(write, name, content, problem):
    path = write(content, name)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert f"{path}{problem}" in str(error.value)
    assert f"{path}{problem}" in first_problem(path, AnyRow()), "the look beforehand finds the same"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "x"}, "no 'prompt'; its keys are 'answer'"),
        ({"prompt": ""}, "'prompt' must hold a text, this is empty"),
        ({"prompt": None}, "'prompt' must hold a text, this is empty"),
        ({"prompt": 7}, "'prompt' must hold a text, this is of type int"),
        (
            {"prompt": [{"role": "user", "content": "secret"}]},
            "'prompt' must hold a text, this is a list: write it as one text",
        ),
        ({"prompt": "secret\ud800"}, "'prompt' must hold a text, this has half a surrogate pair at character 7"),
    ],
)
def test_a_row_without_its_text_is_told_by_line_and_never_quoted(write, row, problem):
    path = write([{"prompt": "secret"}, row])
    with pytest.raises(DataError) as error:
        read_rows(path, [("prompt",)])
    assert str(error.value).startswith(f"{path}:2: {problem}")
    assert "secret" not in str(error.value)
    assert first_problem(path, AnyRow([("prompt",)])).startswith(f"{path}:2: {problem}")


def test_a_byte_order_mark_is_no_part_of_the_first_row(write):
    for name, content in (("a.jsonl", '{"a": "x"}'), ("a.csv", "a\nx\n"), ("a.json", '[{"a": "x"}]')):
        assert read_rows(write(b"\xef\xbb\xbf" + content.encode(), name), [("a",)])[0].text("a") == "x"


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (-0.5, -0.5), ("2.5", 2.5), (None, None), ("", None), (0, 0.0)],
)
def test_numbers(write, value, number):
    assert read_rows(write([{"x": value}]))[0].numbers(["x"]) == [number]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "secret", True, [1], {}, "1e999", 10**400])
def test_what_is_no_finite_number_is_told_by_line(write, value):
    path = write([{"x": 1}, {"x": value}])
    with pytest.raises(LayoutError, match=r"'x' must hold a finite number, this is ") as error:
        read_rows(path)[1].numbers(["x"])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "lacking", "having"),
    [
        ([{"x": 1}, {"x": 0}], 0, 0),
        ([{"x": None}, {}, {"x": ""}], 0, 0),
        ([{"x": 1}, {"x": 0}, {"x": None}], 3, 1),
        ([{}, {"x": ""}, {"x": 0}], 1, 3),
    ],
)
def test_a_column_is_in_all_rows_or_in_none(write, rows, lacking, having):
    path, reader = write(rows), AnyRow(uniform=("x",))
    if not lacking:
        assert len(list(read_file(path, reader))) == len(rows)
        assert first_problem(path, reader) == ""
        return
    problem = rf"jsonl:{lacking}: nothing under 'x', but .*jsonl:{having}: fill it in all rows"
    with pytest.raises(DataError, match=problem):
        list(read_file(path, reader))
    assert re.search(problem, first_problem(path, reader))


class Counting(PreferenceReader):
    """Reads pairs, and counts how often."""

    times = 0

    def read(self, row):
        Counting.times += 1
        return super().read(row)


def test_rows_are_read_once_and_only_as_far_as_they_are_wanted(write):
    path = write([{"prompt": "p", "chosen": "c", "rejected": "r"}] * 250)
    Counting.times = 0
    assert first_problem(path, Counting()) == "" and Counting.times == ROWS_CHECKED == 100
    assert len(list(read_file(path, Counting()))) == Counting.times - 100 == 250
    assert len(list(read_file(path, Counting(), max_rows=7))) == Counting.times - 350 == 7


@pytest.mark.parametrize("load", [load_pairs, load_prompts], ids=["pairs", "prompts"])
def test_a_job_parses_each_row_of_its_files_once(write, monkeypatch, load):
    """And ``check`` the first hundred, with the same function."""
    parsed = []

    def counted(values, *args, **options):
        parsed.append(values)
        return read_pair(values, *args, **options)

    monkeypatch.setattr(preferences, "read_pair", counted)
    monkeypatch.setattr(prompts, "read_pair", counted)
    path = write(
        [{"chosen": f"what is {number}? this", "rejected": f"what is {number}? that"} for number in range(150)]
    )
    data = DataConfig(path=str(path), evaluation_fraction=0.1, cache=None)
    load(data, make_tokenizer(path, 300), 0)
    assert len(parsed) == 150
    (source,) = data.files.values()
    reader = data.preference_reader(source) if load is load_pairs else data.prompt_reader(source)
    assert first_problem(path, reader) == ""
    assert len(parsed) == 250


def test_check_sees_what_a_job_would_refuse_in_the_first_rows(write):
    """Sides that begin differently hold no prompt; ``check`` names the same way out."""
    path = write([{"topic": "q", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(DataError) as error:
        list(read_file(path, PreferenceReader()))
    assert str(error.value) == first_problem(path, PreferenceReader())
    assert "set data.prompt_key to the key that does; its keys are 'topic'" in str(error.value)


def test_a_cell_of_csv_may_be_as_long_as_a_text_is(write):
    path = write("text,mine\n" + "x" * 300_000 + ",1\n", "rows.csv")
    assert first_problem(path, AnyRow([("text", "mine")])) == ""
    assert [len(row.values["text"]) for row in read_rows(path, [("text", "mine")])] == [300_000]
