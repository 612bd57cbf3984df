"""An entry is read back as it was written; a damaged one is made again; a folder that cannot be written costs only time."""

from __future__ import annotations

import errno
import os

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.data import cache as room
from rlhf_ray.data.cache import hash_content, load_or_make, make_key
from rlhf_ray.storage import atomic, manifest

TABLE = pa.table({"ids": pa.array([[1, 2], [], [3]], pa.large_list(pa.int32())), "text": ["é", "", "x"]})


class Made:
    """Makes the table, and counts how often."""

    def __init__(self, table=TABLE):
        self.table, self.times = table, 0

    def __call__(self):
        self.times += 1
        return self.table


def test_what_is_kept_is_made_once(tmp_path):
    make = Made()
    for _ in range(3):
        assert load_or_make(tmp_path / "new" / "folder", "key", make).equals(TABLE)
    assert make.times == 1
    assert load_or_make(tmp_path / "new" / "folder", "other", make).equals(TABLE)
    assert load_or_make(None, "key", make).equals(TABLE)
    assert make.times == 3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_byte_that_changes_is_noticed_and_the_entry_made_again(tmp_path, place, flip):
    load_or_make(tmp_path, "key", lambda: TABLE)
    for name in ("table.arrow", "manifest.json"):
        file = tmp_path / "key" / name
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= flip
        file.write_bytes(content)
        make = Made()
        assert load_or_make(tmp_path, "key", make).equals(TABLE)
        assert make.times == 1
        assert load_or_make(tmp_path, "key", make).equals(TABLE)
        assert make.times == 1, "and is good again"


@pytest.mark.parametrize("name", ["table.arrow", "manifest.json"])
def test_a_file_that_is_gone_or_cut_is_noticed(tmp_path, name, project_log):
    for damage in (lambda file: file.unlink(), lambda file: os.truncate(file, 10)):
        load_or_make(tmp_path, "key", lambda: TABLE)
        damage(tmp_path / "key" / name)
        make = Made()
        assert load_or_make(tmp_path, "key", make).equals(TABLE)
        assert make.times == 1
    assert "it will be made again" in project_log.getvalue()


def test_a_folder_that_cannot_be_written_is_said_and_no_more(tmp_path, project_log):
    (tmp_path / "file").write_text("in the way")
    assert load_or_make(tmp_path / "file", "key", Made()).equals(TABLE)
    assert "encoded rows are not kept for the next run (data.cache)" in project_log.getvalue()


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path, project_log, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    assert load_or_make(tmp_path, "key", Made()).equals(TABLE)
    assert "data.cache" in project_log.getvalue()
    assert "disk full" in project_log.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_a_crash_anywhere_leaves_the_old_entry_or_the_new_one(tmp_path, crash_everywhere):
    """And whoever comes next reads a whole table."""
    load_or_make(tmp_path, "key", lambda: TABLE)
    (tmp_path / "key" / "table.arrow").write_bytes(b"damaged")
    seen = crash_everywhere(
        tmp_path, lambda: load_or_make(tmp_path, "key", lambda: TABLE), lambda: load_or_make(tmp_path, "key", lambda: TABLE),
        [room, atomic, manifest],
    )  # fmt: skip
    assert len(seen) > 3
    assert all(table.equals(TABLE) for table in seen)


def test_a_key_is_of_all_that_is_said_in_any_order():
    assert make_key({"a": 1, "b": 2}) == make_key({"b": 2, "a": 1})
    assert len({make_key(identity) for identity in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {})}) == 5


def test_content_is_all_files_and_their_names_and_not_where_they_lie(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.arrow").write_bytes(b"1")
        (tmp_path / folder / "b.arrow").write_bytes(b"2")
    assert hash_content(tmp_path / "one") == hash_content(tmp_path / "two")
    assert hash_content(tmp_path / "one" / "a.arrow") == hash_content(tmp_path / "two" / "a.arrow")
    (tmp_path / "two" / "b.arrow").rename(tmp_path / "two" / "c.arrow")
    assert hash_content(tmp_path / "one") != hash_content(tmp_path / "two")
    (tmp_path / "one" / "a.csv").write_bytes(b"1")
    assert hash_content(tmp_path / "one" / "a.csv") != hash_content(tmp_path / "one" / "a.arrow"), "the format counts"
