"""A line of JSON counts once its newline is on disk; what a crash cut off costs no other line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import IntegrityError
from rlhf_ray.storage.jsonl import JsonLines


@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2), max_size=4
    )
)
@settings(max_examples=30, deadline=None)
def test_lines_come_back_and_a_cut_at_any_byte_costs_only_what_it_touches(lines: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        path = Path(directory) / "lines.jsonl"
        file = JsonLines(path)
        file.extend(lines)
        assert file.read() == lines
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            untouched = whole[:length].count(b"\n")
            assert file.read() == lines[:untouched]
            file.append({"next": 1})
            assert file.read() == [*lines[:untouched], {"next": 1}]


def test_damage_before_the_end_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2 is damaged .* remove the line"):
        JsonLines(path).read()
    path.write_text('{"step": 1}\n17\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2 is damaged \(int, not an object\)"):
        JsonLines(path).read()


def test_voided_lines_move_and_none_is_lost(tmp_path: Path) -> None:
    file, void = JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "a.void.jsonl")
    file.extend({"step": step} for step in range(5))
    assert file.keep(lambda line: line["step"] < 3, void) == 2
    assert file.keep(lambda line: line["step"] < 3, void) == 0
    assert file.read() == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert void.read() == [{"step": 3}, {"step": 4}]
