"""A line of JSON counts once its newline is on disk; what a crash cut off costs no other line."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import IntegrityError
from rlhf_ray.storage import jsonl
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


@pytest.mark.parametrize("compared", [50, jsonl.COMPARED_BYTES])
def test_a_file_that_is_remembered_reads_as_one_that_is_not_whatever_becomes_of_it(
    compared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are added, torn, cut, replaced and edited, also so that the file is as long as before."""
    monkeypatch.setattr(jsonl, "COMPARED_BYTES", compared)
    draw, path = random.Random(3), tmp_path / "lines.jsonl"
    kept, parsed = JsonLines(path), []
    kept.remember()
    kept._check = lambda line: parsed.append(line) or ""  # type: ignore[func-returns-value]
    writer = JsonLines(path)
    for number in range(150):
        action = draw.choice(["add", "add", "add", "torn", "cut", "replace", "edit", "gone", "blank"])
        raw = path.read_bytes() if path.exists() else b""
        if action == "add":
            writer.extend({"step": number, "value": draw.random()} for _ in range(draw.randrange(4)))
        elif action == "torn":
            path.write_bytes(raw + b'{"step": 7')
        elif action == "blank":
            path.write_bytes(raw[: raw.rfind(b"\n") + 1] + b"\n")
        elif action == "cut":
            path.write_bytes(raw[: draw.randrange(len(raw) + 1)])
        elif action == "replace":
            writer.keep(lambda line, number=number: line["step"] % 3 != number % 3, JsonLines(tmp_path / "void.jsonl"))
        elif action == "edit" and raw.endswith(b"}\n"):
            path.write_bytes(raw[: raw[:-1].rfind(b"\n") + 1] + b'{"step": %d, "edited": 1}\n' % number)
        elif action == "gone":
            path.unlink(missing_ok=True)
        assert kept.read() == JsonLines(path).read(), action


def test_a_line_that_is_remembered_is_parsed_once_and_damage_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    parsed: list[object] = []
    lines = JsonLines(path, lambda line: parsed.append(line["step"]) or "")  # type: ignore[func-returns-value]
    lines.remember()
    for step in range(5):
        JsonLines(path).append({"step": step})
        assert lines.read() == lines.read() and len(lines.read()) == step + 1
    assert parsed == [0, 1, 2, 3, 4]
    with open(path, "ab") as file:
        file.write(b"\nnonsense\n")
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"lines\.jsonl:7 is damaged"):
            lines.read()
