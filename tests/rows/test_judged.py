"""Rows of single answers with labels: what is read, and what is refused with its way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rows.judged import JudgedReader, both_sides
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.read import read_file

USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "Is it late?"), ("assistant", "No.")))


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> list[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_file(path, JudgedReader(**settings)))


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("True", True),
        ("false", False),
        (1.0, True),
        (" 0 ", False),
    ],
)
@pytest.mark.parametrize("key", ["answer", "completion", "response"])
def test_texts_and_their_labels(tmp_path: Path, key: str, label: object, desirable: bool) -> None:
    (row,) = read(tmp_path, {"prompt": "Is it late?", key: " No.", "label": label, "source": "clock"})
    assert (row.prompt, row.answer, row.desirable, row.source) == ("Is it late?", " No.", desirable, "clock")
    assert not row.is_conversation and row.where.endswith("rows.jsonl:1")


def test_messages_with_tools_and_texts_that_become_turns(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    (row,) = read(tmp_path, {"prompt": [USER], "completion": [ASSISTANT], "label": True, "tools": tools})
    assert (list(row.prompt), list(row.answer), row.tools) == ([USER], [ASSISTANT], tools) and row.is_conversation
    (row,) = read(tmp_path, {"prompt": "Is it late?", "completion": "No.", "label": False}, turns=True)
    assert (list(row.prompt), list(row.answer), row.desirable) == ([USER], [ASSISTANT], False)
    pair = row.as_pair()
    assert pair.conversations == (row.prompt, row.answer, row.answer)


def test_keys_of_ones_own(tmp_path: Path) -> None:
    keys = {"prompt_key": "q", "answer_key": "a", "label_key": "good"}
    (row,) = read(tmp_path, {"q": "x", "a": "y", "good": 1, "completion": "not this", "label": 0.3}, **keys)
    assert (row.prompt, row.answer, row.desirable) == ("x", "y", True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "x", "answer": "y", "label": 0.7},
            "'label' must be true or false .or 1 or 0., this is 0.7: name the",
        ),
        (
            {"prompt": "x", "answer": "y", "label": "good"},
            "this is a str that is neither: name the column .* data.label_key",
        ),
        ({"prompt": "x", "answer": "y", "label": None}, "this is a NoneType that is neither"),
        ({"prompt": "", "answer": "y", "label": True}, "nothing under 'prompt', which must hold the prompt"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "no 'prompt' and 'answer' and 'label' or"),
        ({"prompt": [USER], "answer": "y", "label": True}, "'prompt'"),
    ],
)
def test_what_is_wrong_with_a_row_is_one_sentence(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    if isinstance(row["prompt"], list):
        row = row | {"answer": 3}
        message = "'answer'"
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_column_hides_no_filled_one(tmp_path: Path, empty: str | None) -> None:
    row = {"prompt": "x", "answer": empty, "completion": empty, "response": "y", "label": True}
    assert [one.answer for one in read(tmp_path, row)] == ["y"]
    assert [one.answer for one in read(tmp_path, row | {"completion": "z"})] == ["z"], "the first filled one"
    with pytest.raises(DataError, match="'answer' must hold"):
        read(tmp_path, row | {"response": None, "answer": None})


def test_what_is_said_of_the_one_answer_of_a_row_speaks_of_no_sides(tmp_path: Path) -> None:
    own = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}]
    turns = json.dumps(["one", "two"])
    cases: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
        ({"prompt": "Is it late?", "answer": "Is it late? No."}, "'answer' begins with all of 'prompt', which would stand "
         "there twice: set data.prompt_in_sides=true if it holds the prompt, or false if the answer does repeat it", {}),
        ({"prompt": "Is it late?", "answer": "No."}, "'answer' does not begin with 'prompt', as data.prompt_in_sides=true says",
         {"prompt_in_sides": True}),
        ({"prompt": [USER], "answer": own}, "which begins a conversation of its own: mend the prompt", {}),
        ({"prompt": turns, "answer": turns}, "'prompt', 'answer' hold lists of turns written as JSON", {}),
    ]  # fmt: skip
    for row, message, settings in cases:
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path, row | {"label": True}, **settings)
        assert "side" not in str(caught.value).replace("data.prompt_in_sides", "")


def test_a_pair_is_two_judged_answers() -> None:
    pair = PreferencePair("x", "good", "bad", source="s", where="f:1")
    assert [(row.prompt, row.answer, row.desirable, row.source) for row in both_sides(pair)] == [
        ("x", "good", True, "s"), ("x", "bad", False, "s"),
    ]  # fmt: skip
