"""A fingerprint changes with every byte and every name, and with nothing else."""

from __future__ import annotations

import os
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage.fingerprint import Fingerprint, fingerprint_content


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 9), flip=st.integers(1, 255))
def test_one_byte_is_noticed_although_size_and_time_are_the_same(tmp_path, place, flip):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"0123456789")
    os.utime(file, ns=(1, 1))
    before = fingerprint_content([file])
    content = bytearray(file.read_bytes())
    content[place] ^= flip
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    after = fingerprint_content([file])
    assert before != after and before.digest != after.digest
    assert before.changed_files(after) == [".jsonl"]


def test_where_files_lie_does_not_count_and_what_is_missing_is_named(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "part").mkdir(parents=True)
        (tmp_path / folder / "part" / "a.csv").write_text("a")
        (tmp_path / folder / "b.csv").write_text("b")
    one, two = (fingerprint_content([tmp_path / folder]) for folder in ("one", "two"))
    assert one == two and one.digest == two.digest and str(one) == one.digest[:12]
    (tmp_path / "two" / "b.csv").unlink()
    assert one.changed_files(fingerprint_content([tmp_path / "two"])) == ["b.csv"]


def test_a_fingerprint_is_read_back_as_it_was_and_a_damaged_one_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    made = fingerprint_content([tmp_path])
    content = made.to_json()
    assert Fingerprint.from_json(content, "here") == made
    for damaged in (
        {},
        [],
        None,
        {**content, "files": [["a", "0"]]},
        {**content, "files": 3},
        {**content, "sha256": 1},
    ):
        with pytest.raises(IntegrityError, match="here is damaged"):
            Fingerprint.from_json(damaged, "here")


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"rows\.jsonl: No such file"):
        fingerprint_content([tmp_path / "rows.jsonl"])


def test_a_pipe_is_neither_waited_for_nor_read(tmp_path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    writer = Thread(target=pipe.write_bytes, args=(b"{}",), daemon=True)  # so that one who reads comes to an end
    writer.start()
    with pytest.raises(StorageError, match=r"rows\.jsonl is no regular file"):
        fingerprint_content([pipe])
    assert writer.is_alive(), "nobody has read"
    assert pipe.read_bytes() == b"{}"
