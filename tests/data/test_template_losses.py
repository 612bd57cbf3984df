"""What a chat template leaves out is said once for each kind, with how many rows have it and one of them, and no text of it."""

from __future__ import annotations

import json
import logging

import pytest

from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encoded_pairs import PairFile, encode_pair_file
from rlhf_ray.errors import RequestError
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.sources import RowSource

from .chat_templates import SHAPES, make_tokenizer
from .test_chat import CHATML, OPENS, THINKS, assistant, user

get_logger()  # set up before pytest looks where to listen
DROPS = "a think block that the prompt opens and a finished answer has not"
STRIPS = "blanks stripped and the day written"
LOSES_ROLES = (
    "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL = [{"type": "function", "function": {"name": "look_up"}}]
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]


@pytest.fixture
def said(tmp_path, caplog):
    """What is logged of rows that a template writes, with the cache and without."""

    def say(chat, *rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = PairFile(RowSource(str(path)), PreferenceReader(), 10_000)
        heard = []
        for cache in (None, tmp_path / "cache", tmp_path / "cache"):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                encode_pair_file(file, chat, cache)
            heard.append([record.getMessage() for record in caplog.records])
        assert heard[0] == heard[1] == heard[2], "what is read from the cache is said too"
        assert not any("secret" in line for line in heard[0]), "no text of a row is quoted"
        return heard[0]

    return say


def pair(*prompt, **more):
    return {"prompt": list(prompt), "chosen": [assistant("yes, secret")], "rejected": [assistant("no")], **more}


def chat_of(name, variables=None):
    return ChatFormat(make_tokenizer(SHAPES[name]), SHAPES[name].variables if variables is None else variables)


def test_nothing_is_said_where_nothing_is_lost(said):
    rows = [pair({"role": "system", "content": "secret"}, user("why?")), pair(user("a"), assistant("b"), user("c"))]
    assert said(chat_of(CHATML), *rows) == []


@pytest.mark.parametrize(
    ("name", "row", "kind"),
    [
        (STRIPS, pair(user("why, secret?\n")), "blanks at the ends of messages"),
        (THINKS, pair(user("a"), assistant("<think>secret</think>b"), user("c")), "the thinking of earlier answers"),
        (CHATML, pair(user("a"), assistant("b", reasoning_content="secret"), user("c")), "the thinking of earlier answers"),
        (CHATML, pair(user("a"), tools=TOOL), "the tools column"),
        (CHATML, {**pair(user("a")), "chosen": [assistant("b", reasoning_content="secret")]}, "the thinking beside"),
        (CHATML, {**pair(user("a")), "chosen": [assistant("b", tool_calls=CALL)]}, "calls of tools"),
        (OPENS, pair(user("a")), "opens a block of thinking, but there is no thinking in an answer"),
        (DROPS, pair(user("a")), "opens a block of thinking, but there is no thinking in an answer"),
    ],
)  # fmt: skip
def test_each_kind_is_said_once_with_a_count_and_an_example(said, name, row, kind):
    whole = {**pair(user("a")), "chosen": [assistant("x\n</think>\ny")], "rejected": [assistant("z\n</think>\ny")]}
    lines = [line for line in said(chat_of(name), whole, row, row) if kind in line]
    assert len(lines) == 1
    assert "in 2 of 3 conversations, such as row 2: " in lines[0]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_message_that_vanishes_is_said_by_its_role(said, role):
    tokenizer = make_tokenizer(SHAPES[CHATML])
    tokenizer.chat_template = LOSES_ROLES
    (line,) = said(ChatFormat(tokenizer), pair({"role": role, "content": "secret"}, user("why?")))
    assert f"leaves out the text of messages of the {role} in 1 of 1 conversations, such as row 1: " in line


def test_a_day_is_said_once_with_the_way_to_fix_it(said):
    (line,) = said(chat_of(STRIPS, {}), pair(user("why?")), pair(user("when?")))
    assert "writes the day (" in line and "date_string" in line
    assert said(chat_of(STRIPS), pair(user("why?"))) == []


def test_a_variable_that_the_template_does_not_read_is_refused(said):
    with pytest.raises(RequestError, match=r"data\.template_variables: .* reads no variable 'enable_thinkng'"):
        said(chat_of(THINKS, {"enable_thinkng": False}), pair(user("why?")))
    assert said(chat_of(THINKS, {"enable_thinking": False}), pair(user("why?"))) == []
