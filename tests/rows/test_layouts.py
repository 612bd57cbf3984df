"""Four layouts are told apart by the row itself; a row that is none of them says what was expected."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.rows.layouts import Keys, LayoutError, read_pair
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import read_row
from rlhf_ray.rows.row import Row

KEYS = Keys()
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "c"), ("assistant", "r"))
)
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f"}}
TALK = ((USER,), (GOOD,), (BAD,))


def read_preference(values) -> PreferencePair:
    return read_row(PreferenceReader(KEYS), Row(values, "here"))


def read(turns=False, **values):
    parts = read_pair(values, KEYS, turns=turns)
    return tuple(part if isinstance(part, str) else tuple(part) for part in parts[:3])


def test_texts():
    assert read(prompt="p", chosen="c", rejected="r") == ("p", "c", "r")
    assert read(chosen="pc", rejected="pr") == ("", "pc", "pr")
    assert read(prompt="", chosen="pc", rejected="pr", system="", tools=None) == ("", "pc", "pr"), (
        "empty cells are nothing"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "c", "rejected": "r"},
    ],
)
def test_conversations_with_a_prompt_of_their_own(values):
    assert read(**values) == TALK


@pytest.mark.parametrize("prompt", [{}, {"prompt": "q"}, {"prompt": [USER]}, {"prompt": None}])
def test_whole_conversations_with_and_without_the_prompt_beside_them(prompt):
    assert read(chosen=[USER, GOOD], rejected=[USER, BAD], **prompt) == ((), (USER, GOOD), (USER, BAD))


def test_texts_become_turns():
    assert read(True, prompt="q", chosen="c", rejected="r") == TALK
    assert read(True, prompt="q", chosen="c", rejected="r", system="s")[0] == (SYSTEM, USER)
    assert read(True, prompt=[USER], chosen=[GOOD], rejected=[BAD]) == TALK, "what are turns already stay so"


def test_a_system_column_comes_first():
    assert read(prompt=[USER], chosen=[GOOD], rejected=[BAD], system="s") == ((SYSTEM, USER), (GOOD,), (BAD,))
    whole = read(chosen=[USER, GOOD], rejected=[USER, BAD], system="s")
    assert whole == ((), (SYSTEM, USER, GOOD), (SYSTEM, USER, BAD))


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_a_list_or_one_written_as_json(tools):
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": tools}
    assert read_pair(row, KEYS).tools == [TOOL]
    assert read_pair(row | {"tools": "[]"}, KEYS).tools is None


def test_empty_fields_that_a_table_gives_to_all_messages_are_left_out():
    padded = [{**message, "tool_calls": None} for message in (USER, GOOD)]
    assert read(chosen=padded, rejected=[USER, BAD], prompt=padded[:1]) == ((), (USER, GOOD), (USER, BAD))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"chosen": "c", "rejected": [BAD]}, "'chosen' is a text and 'rejected' is a conversation: write both in the same"),
        ({"chosen": "", "rejected": "r"}, "'chosen' must hold a text or a list of messages, this is empty"),
        ({"chosen": [], "rejected": [BAD]}, "'chosen': holds no message"),
        ({"prompt": 7, "chosen": "c", "rejected": "r"}, "'prompt' must hold a text or a list of messages, this is of type int"),
        ({"chosen": [USER, GOOD, GOOD], "rejected": [USER, BAD]}, "message 3 of 'chosen' is of 'assistant', but 'user' was ex"),
        ({"chosen": [USER, GOOD], "rejected": [BAD, USER]}, "message 1 of 'rejected' is of 'assistant', but 'system' or "),
        ({"chosen": [GOOD], "rejected": [BAD]}, "message 1 of 'chosen' is of 'assistant', but 'system' or 'developer' or 'use"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "message 1 of 'chosen' is of 'user', but 'assistant' was ex"),
        ({"prompt": "q", "chosen": [USER], "rejected": [USER]}, "'chosen' ends with 'user', but 'assistant' was expected"),
        ({"prompt": [{"role": "user"}], "chosen": "c", "rejected": "r"}, "'prompt': message 1 must hold a text under 'content"),
        ({"chosen": "c", "rejected": "r", "system": "s"}, "there is something under 'system', for which a plain text has no p"),
        ({"chosen": "c", "rejected": "r", "tools": [TOOL]}, "there is something under 'tools', for which a plain text has no "),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "system": "s"}, "'system' holds a text, but the conv"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": 7}, "'system' must hold a text, this is of type in"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "{"}, "'tools' must hold a list of functions, and t"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": {"a": 1}}, "'tools' must hold a list of functions, "),
    ],
)  # fmt: skip
def test_rows_without_a_layout(values, problem):
    with pytest.raises(LayoutError) as error:
        read_pair(values, KEYS)
    assert str(error.value).startswith(problem)
    with pytest.raises(LayoutError) as of_reader:
        read_preference(values)
    assert str(of_reader.value) == str(error.value)


@pytest.mark.parametrize("key", ["margin", "grade"])
def test_a_number_that_is_none(key):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert getattr(read_preference(row | {key: "0.5"}), key) == 0.5
    assert getattr(read_preference(row | {key: ""}), key) is None
    with pytest.raises(LayoutError) as error:
        read_preference(row | {key: "much"})
    assert str(error.value) == f"'{key}' must hold a finite number, this is a str that is none"


def test_both_numbers_that_are_none_are_named():
    with pytest.raises(LayoutError, match=r"'margin' must hold .* and 'grade' must hold a finite number, this is nan"):
        read_preference({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "x", "grade": float("nan")})


def test_whole_texts_that_are_no_dialogues_cannot_become_turns():
    with pytest.raises(
        LayoutError, match=r"nothing under 'prompt' and no dialogue .* in the sides, but data\.apply_chat_te"
    ):
        read(True, chosen="pc", rejected="pr")


def test_other_keys():
    row = {"q": "p", "better": "c", "worse": "r"}
    assert read_pair(row, Keys("q", "better", "worse"))[:3] == ("p", "c", "r")
    with pytest.raises(LayoutError) as error:
        read_preference(row)
    assert str(error.value) == "no 'chosen' and 'rejected'; its keys are 'q', 'better', 'worse'"
