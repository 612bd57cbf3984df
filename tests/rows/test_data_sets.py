"""Data sets come in the library's order, one split at a time; what cannot be had names the way out and quotes no row."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from rlhf_ray.errors import DataError
from rlhf_ray.rows.preferences import PreferenceReader, read_preferences
from rlhf_ray.rows.read import WAY_OUT, AnyRow, first_problem, read_rows
from rlhf_ray.rows.sources import RowSource, content_files, every_split

PAIRS = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": "r"} for number in range(5)]
TALK = [
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "tool_calls": None}],
    }
]


@pytest.fixture(autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path | str, split: str | None = None, config: str | None = None) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_rows(RowSource(str(path), split, config))]


def test_a_saved_data_set_in_the_order_in_which_it_was_saved(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(PAIRS).select([3, 1, 4, 0])
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    assert read(tmp_path / "saved") == [PAIRS[number] for number in (3, 1, 4, 0)]
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by a map")
    rows = read_rows(tmp_path / "saved")
    assert [row.where for row in rows] == [f"{tmp_path / 'saved'}: row {number}" for number in (1, 2, 3, 4)]


def test_a_saved_data_set_of_several_splits(tmp_path: Path) -> None:
    halves = {"first": PAIRS[:3], "test": PAIRS[3:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in halves.items()})
    saved.save_to_disk(tmp_path)
    assert read(tmp_path, "test") == PAIRS[3:]
    assert read(tmp_path / "first") == PAIRS[:3], "each split is a folder of its own"
    assert [source.split for source in every_split(RowSource(str(tmp_path)))] == ["first", "test"]
    with pytest.raises(DataError, match=r"holds several splits, one is expected: set the split .* of 'first', 'test'"):
        read(tmp_path)
    with pytest.raises(DataError, match="no split is called 'nope': name one of 'first', 'test'"):
        read(tmp_path, "nope")
    assert read(tmp_path, "first[1:]+test[:1]") == PAIRS[1:4], "a slice is cut where the data set lies"
    with pytest.raises(DataError, match=r"no such split as 'first\[9:3x\]'"):
        read(tmp_path, "first[9:3x]")


def test_a_slice_of_one_saved_split_is_what_the_library_cuts_out_of_it(tmp_path: Path) -> None:
    datasets.Dataset.from_list(PAIRS, split="validation").save_to_disk(tmp_path / "named")
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "nameless")
    for name, folder in (("validation", "named"), ("train", "nameless")):
        assert read(tmp_path / folder, name) == PAIRS
        assert read(tmp_path / folder, f"{name}[-2:]") == PAIRS[-2:]
        assert read(tmp_path / folder, f"{name}[:50%]") == PAIRS[: round(len(PAIRS) / 2)]
        with pytest.raises(DataError, match=f"name one of '{name}'"):
            read(tmp_path / folder, "other[:1]")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "arrow"])
def test_a_folder_of_data_files_gives_the_rows_of_its_files(tmp_path: Path, suffix: str) -> None:
    parts = {f"part-{number}.{suffix}": PAIRS[number : number + 2] for number in (0, 2)}
    for name, rows in parts.items():
        data_set = datasets.Dataset.from_list(rows)
        if suffix == "arrow":
            with (
                pyarrow.OSFile(str(tmp_path / name), "wb") as file,
                pyarrow.ipc.new_stream(file, data_set.data.table.schema) as writer,
            ):
                writer.write_table(data_set.data.table)
        elif suffix == "parquet":
            parquet.write_table(data_set.data.table, tmp_path / name)
        elif suffix == "csv":
            data_set.to_csv(tmp_path / name)
        else:
            data_set.to_json(tmp_path / name, lines=suffix == "jsonl")
    assert read(tmp_path) == PAIRS[:4]
    assert read_preferences(RowSource(str(tmp_path))) == [
        pair for name in parts for pair in read_preferences(tmp_path / name)
    ]


def test_files_come_in_the_order_of_their_names_as_text(tmp_path: Path) -> None:
    for number in (9, 10):
        write_lines(tmp_path / f"part-{number}.jsonl", [PAIRS[number - 9]])
    assert read(tmp_path) == [PAIRS[1], PAIRS[0]]


def test_a_split_may_be_a_slice_or_a_sum(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", PAIRS[:3])
    write_lines(tmp_path / "test.jsonl", PAIRS[3:])
    assert read(tmp_path, "train") == PAIRS[:3]
    assert read(tmp_path, "train[1:]") == PAIRS[1:3]
    assert read(tmp_path, "train[:34%]+test") == [PAIRS[0], *PAIRS[3:]]
    assert read(tmp_path) == PAIRS[:3], "where none is named and there are several, it is train"
    for wrong in ("train[a:]", "validation", "train+dev"):
        with pytest.raises(DataError, match="split"):
            read(tmp_path, wrong)


def test_a_slice_of_a_folder_that_changed_is_read_anew(tmp_path: Path) -> None:
    for rows in (PAIRS[:3], PAIRS[1:4]):
        write_lines(tmp_path / "train.jsonl", rows)
        assert read(tmp_path, "train[:2]") == rows[:2]


def test_a_configuration_is_named_where_there_are_several(tmp_path: Path) -> None:
    for name, row in (("helpful", PAIRS[0]), ("harmless", PAIRS[1])):
        write_lines(tmp_path / name / "train.jsonl", [row])
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("helpful", "harmless"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read(tmp_path, config="harmless") == [PAIRS[1]]
    with pytest.raises(DataError, match=r"several configurations.* set data.config to one of 'helpful', 'harmless'"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"'nope' not found\. Available: .*'helpful'.*: set data\.config"):
        read(tmp_path, config="nope")


def test_conversations_are_those_of_a_file(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TALK).save_to_disk(tmp_path / "saved")
    parquet.write_table(pyarrow.Table.from_pylist(TALK), write_lines(tmp_path / "folder" / "a.parquet", []))
    expected = read_preferences(write_lines(tmp_path / "rows.jsonl", TALK))
    assert read_preferences(tmp_path / "saved") == read_preferences(tmp_path / "folder") == expected


def test_a_folder_is_looked_at_without_torch(tmp_path: Path) -> None:
    """Which would make ``check`` take seconds longer."""
    write_lines(tmp_path / "a.jsonl", PAIRS)
    program = (
        "import sys\nfrom rlhf_ray.rows.preferences import read_preferences\n"
        f"assert len(read_preferences({str(tmp_path)!r})) == {len(PAIRS)}\n"
        "print({'torch', 'transformers', 'ray'} & set(sys.modules))\n"
    )
    problem = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert problem == "set()\n"


def test_what_is_wrong_with_a_row_names_its_number(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "secret", "chosen": "c"}])
    source = RowSource(str(tmp_path), "train")
    problem = f"{tmp_path} (train): row 6: 'rejected' must hold a text or a list of messages, this is empty"
    assert first_problem(source, PreferenceReader()) == f"{problem}: {WAY_OUT}"
    with pytest.raises(DataError) as error:
        read_preferences(source)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": secret}\n', '{"a": 1}\n' * 3 + '{"a": "secret"}\n', "secret"])
@pytest.mark.parametrize("split", [None, "train[:90%]"])
def test_what_the_library_cannot_read_is_told_without_its_words(
    tmp_path: Path, content: str, split: str | None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", [{"a": 1}])
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"cannot read it \(\w+.*\): datasets\.load_dataset\(.*\) shows why") as error:
        read(tmp_path, split)
    assert "secret" not in f"{error.value}{caplog.text}{''.join(capfd.readouterr())}"


def test_a_folder_guesses_types_and_a_file_does_not(tmp_path: Path) -> None:
    """As docs/configuration.md says."""
    table = tmp_path / "csv" / "rows.csv"
    table.parent.mkdir()
    table.write_text("prompt,answer,label\np,None,007\nq,NA,008\n")
    as_written = [("p", "None", "007"), ("q", "NA", "008")]
    assert [tuple(row.values()) for row in read(table)] == as_written
    assert [tuple(row.values()) for row in read(table.parent)] == [("p", None, 7), ("q", None, 8)]
    dates = write_lines(tmp_path / "json" / "rows.jsonl", [{"label": "2026-01-02"}, {"label": "2026-01-03", "x": 1}])
    assert read(dates) == [{"label": "2026-01-02"}, {"label": "2026-01-03", "x": 1}]
    assert read(dates.parent) == [{"label": datetime(2026, 1, day), "x": x} for day, x in ((2, None), (3, 1))]


def test_files_that_the_library_leaves_out_are_named(tmp_path: Path, project_log: Any) -> None:
    """One file that is named like a split makes it forget the others; and it reads one format of several."""
    write_lines(tmp_path / "a.jsonl", PAIRS[:1])
    assert read(tmp_path) == PAIRS[:1] and project_log.getvalue() == ""
    write_lines(tmp_path / "b_test.jsonl", PAIRS[1:2])
    assert read(tmp_path) == PAIRS[1:2]
    assert f"{tmp_path}: the datasets library takes splits from the names of files" in project_log.getvalue()
    assert "it leaves out a.jsonl" in project_log.getvalue()


def test_of_many_files_that_are_left_out_ten_are_named(tmp_path: Path, project_log: Any) -> None:
    write_lines(tmp_path / "b_test.jsonl", PAIRS[:1])
    for number in range(12):
        write_lines(tmp_path / f"{number:02}.jsonl", PAIRS[:1])
    read(tmp_path)
    assert "09.jsonl and 2 more" in project_log.getvalue() and "10.jsonl" not in project_log.getvalue()


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no files"):
        read(tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("nothing")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.md").write_text("nothing")
    for folder in ("notes", "pages"):
        with pytest.raises(DataError, match=rf"{folder}: holds no data files: name a data file, or a folder of"):
            read(tmp_path / folder)
    with pytest.raises(DataError, match="no such file or folder: name a data file"):
        read(tmp_path / "rows.jsonl")
    file = write_lines(tmp_path / "rows.jsonl", PAIRS)
    with pytest.raises(DataError, match="one file has neither splits nor configurations: remove split and config"):
        read(file, "train", "default")


# ------------------------------------------------------------------------------------------------------------ the hub


def test_a_hub_that_may_not_be_asked_is_one_error_with_the_ways_out() -> None:
    """As in every process of a job whose config names no hub id."""
    program = (
        "from rlhf_ray import environment; environment.prepare()\n"
        "from rlhf_ray.rows.preferences import read_preferences\n"
        "from rlhf_ray.errors import DataError\n"
        "try: read_preferences('Org/set')\n"
        "except DataError as error: print(error)\n"
    )
    problem = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    assert problem.startswith(
        "Org/set: no such file or folder here, and the hub does not give a data set of this name ("
    )
    assert "OfflineModeIsEnabled" in problem
    assert "datasets.load_dataset('Org/set', split='train').save_to_disk('rows')" in problem
    assert "let this process ask the hub, by starting it with HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0" in problem


def test_a_data_set_of_a_hub_is_copied_once_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: Any
) -> None:
    """With a folder in the hub's place, at the library's own door."""
    write_lines(tmp_path / "train.jsonl", PAIRS[:3])
    write_lines(tmp_path / "test.jsonl", PAIRS[3:])
    load = datasets.load_dataset_builder

    def from_folder(path: str, config: str | None) -> Any:
        assert (path, config) == ("Org/set", None)
        return load(str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    source = RowSource("Org/set", "train")
    assert read_preferences(source) == read_preferences(tmp_path / "train.jsonl")
    assert "Org/set: reading split train, which is downloaded unless it is in" in project_log.getvalue()
    assert read("Org/set", "test[:1]") == PAIRS[3:4]
    assert first_problem(source, AnyRow([("question",)])).startswith("Org/set (train): row 1: no 'question'")
    files = content_files(source)
    assert files and all(file.suffix == ".arrow" for file in files)
