"""One entry a row, used or dropped; what is read from the cache is what encoding the file again would give."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import pyarrow
import pytest
from pyarrow import parquet

from rlhf_ray.data import encoded_pairs as room
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import EQUAL, TOO_LONG
from rlhf_ray.data.encoded_pairs import PairExample, PairFile, encode_pair_file, encode_pair_rows
from rlhf_ray.errors import DataError
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferenceReader, read_preferences
from rlhf_ray.rows.sources import RowSource
from tests.data.chat_templates import SHAPES
from tests.data.test_chat import assistant, user

CHATML = SHAPES["a newline after the end"].template
TEXTS = [
    {"prompt": "how?", "chosen": " so", "rejected": " not so", "margin": 0.5, "grade": 1, "source": "a"},
    {"prompt": "how? ", "chosen": " so", "rejected": " so", "margin": 0, "grade": 0, "source": ""},
    {"prompt": "what?", "chosen": " this " * 99, "rejected": " that", "margin": 1, "grade": 2, "source": "b"},
    {"prompt": "who?", "chosen": " you", "rejected": " me", "margin": 2, "grade": 0, "source": "b"},
]


def plain(rows):
    """Rows as plain values, so that they compare."""
    return [
        (row.prompt, row.pair)
        if isinstance(row.pair, str)
        else (row.prompt, {**asdict(row.pair), "chosen": list(row.pair.chosen), "rejected": list(row.pair.rejected)})
        for row in rows
    ]


@pytest.fixture
def file(write):
    return PairFile(RowSource(str(write(TEXTS))), PreferenceReader(), max_tokens=60)


@pytest.fixture
def encodings(monkeypatch):
    """Counts how often rows are encoded."""
    counted, encode = [], room.encode_pair_part
    monkeypatch.setattr(room, "encode_pair_part", lambda *args, **more: counted.append(1) or encode(*args, **more))
    return counted


def test_every_row_has_an_entry_with_all_that_it_says(byte_tokenizer, file):
    rows = encode_pair_file(file, ChatFormat(byte_tokenizer), source="mine")
    assert [row.pair if isinstance(row.pair, str) else "" for row in rows] == ["", EQUAL, TOO_LONG, ""]
    pair, last = rows[0].pair, rows[3].pair
    assert byte_tokenizer.decode(pair.chosen) == "how? so<eos>"
    assert byte_tokenizer.decode(pair.rejected) == "how? not so<eos>"
    assert byte_tokenizer.decode(pair.chosen[: pair.prompt_length]) == "how?"
    assert (pair.margin, pair.grade, pair.source, pair.cut) == (0.5, 1.0, "a", 0)
    assert (last.margin, last.grade, last.source) == (2.0, 0.0, "b")
    assert rows[0].prompt == rows[1].prompt, "spaces around it make no other prompt"
    assert len({row.prompt for row in rows}) == 3
    assert plain(encode_pair_rows(read_preferences(file.rows), ChatFormat(byte_tokenizer), 60)) == plain(
        encode_pair_file(file, ChatFormat(byte_tokenizer))
    )


def test_rows_that_name_no_source_have_that_of_their_file(byte_tokenizer, write):
    path = write([{"prompt": "p", "chosen": " a", "rejected": " b"}])
    for source in ("mine", ""):
        (row,) = encode_pair_file(
            PairFile(RowSource(str(path)), PreferenceReader(), 60), ChatFormat(byte_tokenizer), source=source
        )
        assert row.pair.source == source
        assert (row.pair.margin, row.pair.grade) == (None, None)


def test_the_cache_gives_what_encoding_gives(byte_tokenizer, file, tmp_path, encodings):
    fresh = plain(encode_pair_file(file, ChatFormat(byte_tokenizer), source="mine"))
    for times in (2, 2, 2):
        assert plain(encode_pair_file(file, ChatFormat(byte_tokenizer), tmp_path / "cache", source="mine")) == fresh
        assert len(encodings) == times
    assert plain(encode_pair_file(file, ChatFormat(byte_tokenizer), tmp_path / "cache")) == plain(
        encode_pair_file(file, ChatFormat(byte_tokenizer))
    )


def test_whatever_decides_the_ids_is_in_the_key(
    byte_tokenizer, spaced_tokenizer, file, tmp_path, encodings, monkeypatch
):
    def encodes(one, tokenizer=byte_tokenizer, variables=None):
        before = len(encodings)
        encode_pair_file(one, ChatFormat(tokenizer, variables or {}), tmp_path / "cache")
        return len(encodings) - before

    assert encodes(file)
    assert not encodes(file)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert not encodes(replace(file, rows=RowSource(str(moved)))), "where a file lies does not count"
    for change in (
        {"max_tokens": 61},
        {"cut_prompt": True},
        {"max_rows": 2},
        {"reader": PreferenceReader(Keys(chosen="rejected"))},
    ):
        assert encodes(replace(file, **change)), change
        assert not encodes(replace(file, **change)), change
    for template in ("<s> $A", "<s> $A </s>"):
        assert encodes(file, spaced_tokenizer(template)), "what a tokenizer adds by itself counts"
    monkeypatch.setattr(byte_tokenizer, "chat_template", CHATML)
    assert encodes(file), "the template counts"
    assert encodes(replace(file, reader=PreferenceReader(turns=True)))
    assert encodes(file, variables={"enable_thinking": False}), "the variables of the template count"
    with monkeypatch.context() as tomorrow:
        tomorrow.setattr(ChatFormat, "day", "2026-11-30")
        assert encodes(file), "the day counts where the template writes it"
    monkeypatch.setattr(byte_tokenizer, "chat_template", None)
    assert not encodes(file)
    with moved.open("a") as added:
        added.write(json.dumps(TEXTS[3]) + "\n")
    assert encodes(replace(file, rows=RowSource(str(moved)))), "the content counts"


def test_conversations_of_a_table_are_those_of_a_text_file(byte_tokenizer, monkeypatch, write, tmp_path):
    """Tables give every message all fields, null where a message has none."""
    monkeypatch.setattr(byte_tokenizer, "chat_template", CHATML)
    call = {"role": "assistant", "content": "wait", "tool_calls": [{"function": {"name": "f"}}]}
    answer = {"role": "tool", "content": "7"}
    talks = [
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": [call, answer, assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("other")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(talks), tmp_path / "rows.parquet")
    results = [
        encode_pair_file(PairFile(RowSource(str(path)), PreferenceReader(), 400), ChatFormat(byte_tokenizer))
        for path in (write(talks), tmp_path / "rows.parquet")
    ]
    assert plain(results[0]) == plain(results[1])
    assert [row.prompt == results[0][0].prompt for row in results[0]] == [True, True, False]
    assert all(isinstance(row.pair, PairExample) for row in results[0])
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in talks]
    assert plain(
        encode_pair_file(PairFile(RowSource(str(write(whole))), PreferenceReader(), 400), ChatFormat(byte_tokenizer))
    ) == plain(results[0]), "implicit prompts"


def test_bad_rows_are_named_also_where_the_rest_is_read_from_the_cache(byte_tokenizer, write, tmp_path, project_log):
    """Rows of a wrong form, and conversations that the chat template refuses."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "[{{ message.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    sides = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    rows = [{"prompt": [user("q")], **sides}, {"prompt": [user("q")], **sides, "system": "s"}]
    path = write([*rows, {"prompt": [assistant("q")], **sides}])
    file = PairFile(RowSource(str(path)), PreferenceReader(drops_bad_rows=True), 60)
    for _ in range(2):
        project_log.seek(project_log.truncate(0))
        assert len(encode_pair_file(file, ChatFormat(tokenizer), tmp_path / "cache")) == 1
        assert "2 bad rows are left out (data.bad_rows)" in project_log.getvalue()
        assert "jsonl:3: message 1 of 'prompt' is of 'assistant'" in project_log.getvalue()
        assert (
            "jsonl:2: the tokenizer's chat template refuses the conversation: no system here" in project_log.getvalue()
        )
    with pytest.raises(DataError, match=r"jsonl:2: the tokenizer's chat template refuses"):
        encode_pair_file(replace(file, reader=PreferenceReader(), max_rows=2), ChatFormat(tokenizer))
    refused = PairFile(RowSource(str(write(rows[1:], "one.jsonl"))), PreferenceReader(drops_bad_rows=True), 60)
    with pytest.raises(
        DataError, match=r"one\.jsonl: all 1 rows are bad, so none is left; the first: .*one\.jsonl:1: the"
    ):
        encode_pair_file(refused, ChatFormat(tokenizer))
