"""A row is one demonstration: two texts, or a conversation with the places of the answers to learn; what is wrong is named."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration, read_demonstrations


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [user("one?"), assistant("1"), user("two?"), assistant("2"), user("three?"), assistant("3")]


def read_one(write, row, **settings):
    (demonstration,) = read_demonstrations(write([row]), **settings)
    return demonstration


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {
            "conversations": [
                {"from": "human" if i % 2 == 0 else "gpt", "value": m["content"]} for i, m in enumerate(TALK)
            ]
        },
        {"conversation": json.dumps(TALK)},
        {"messages": TALK, "prompt": None, "answer": ""},
        {"messages": TALK, "prompt": "one?"},
        {"prompt": TALK[:-1], "answer": "3"},
        {"prompt": TALK[:1], "answer": TALK[1:]},
        {"prompt": "one?", "answer": TALK[1:]},
        {"prompt": TALK[:-1], "answer": assistant("3")},
    ],
)
def test_a_conversation_is_read_from_every_layout(write, row):
    read = read_one(write, row)
    assert list(read.messages) == TALK
    assert read.learned == (1, 3, 5) and (read.prompt, read.answer) == ("", "")
    assert read.is_conversation and list(read.asked) == TALK[:1]


def test_texts_stay_texts_and_become_turns_where_asked(write):
    row = {"prompt": "one?", "answer": " 1"}
    assert read_one(write, row) == Demonstration("one?", " 1")
    assert read_one(write, row).asked == "one?"
    turned = read_one(write, row | {"system": "Count."}, turns=True)
    assert list(turned.messages) == [{"role": "system", "content": "Count."}, user("one?"), assistant(" 1")]
    assert turned.learned == (2,)


def test_tools_and_variables_are_read_with_a_conversation(write):
    tools, variables = [{"name": "count"}], {"enable_thinking": False}
    read = read_one(write, {"messages": TALK, "tools": tools, "chat_template_kwargs": variables})
    assert (read.tools, read.template_variables) == (tools, variables)


@pytest.mark.parametrize(
    ("marks", "train_on", "learned"),
    [
        ({}, "answers", (1, 3, 5)),
        ({}, "last_answer", (5,)),
        ({}, "all", (1, 3, 5)),
        ({1: {"train": False}}, "answers", (3, 5)),
        ({1: {"weight": 0}, 5: {"weight": 1}}, "answers", (3, 5)),
        ({0: {"train": False}, 3: {"train": False}, 5: {"train": True}}, "answers", (1, 5)),
        ({3: {"weight": 0.0}}, "last_answer", (5,)),
        ({3: {"train": True, "weight": 0}}, "answers", (1, 5)),
        ({1: {"train": None}}, "answers", (1, 3, 5)),
        ({1: {"train": True}}, "all", (1, 3, 5)),
    ],
)
def test_messages_say_whether_they_are_learned_and_templates_never_see_that(write, marks, train_on, learned):
    marked = [{**message, **marks.get(place, {})} for place, message in enumerate(TALK)]
    read = read_one(write, {"messages": marked}, train_on=train_on)
    assert read.learned == learned
    assert list(read.messages) == TALK


def _marked(place, **marks):
    return [{**message, **(marks if number == place else {})} for number, message in enumerate(TALK)]


@pytest.mark.parametrize(
    ("row", "train_on", "problem"),
    [
        ({"messages": TALK, "prompt": "one?", "answer": "1"}, "answers",
         "holds 'prompt' and 'answer', and also 'messages', so two demonstrations: name the columns that are not to be read in "
         "data.ignore_columns"),
        ({"messages": TALK, "conversations": TALK}, "answers", "holds 'messages', and also 'conversations'"),
        ({"messages": _marked(1, weight=0.5)}, "answers",
         "message 2 has 'weight' of type float: write true or false, or 1 or 0"),
        ({"messages": _marked(1, train="no")}, "answers", "message 2 has 'train' of type str"),
        ({"messages": _marked(2, train=True)}, "answers",
         "message 3 is of 'user' and marked to be learned ('train'), but only answers of the assistant are: remove the mark; "
         "data.train_on=all learns every token"),
        ({"messages": _marked(1, train=False)}, "all",
         "message 2 is marked as not to be learned ('train'), but data.train_on=all learns every token"),
        ({"messages": _marked(5, train=False)}, "last_answer",
         "the last answer is marked as not to be learned, so there is nothing to learn: leave the row out"),
        ({"messages": [user("one?"), assistant("1", weight=0)]}, "answers", "all answers are marked as not to be learned"),
        ({"messages": TALK[:-1]}, "answers", "'messages' ends with 'user', but 'assistant' was expected to answer"),
        ({"messages": "text"}, "answers", "'messages' must hold a list of messages, this is a text"),
        ({"prompt": TALK[:-1], "answer": ""}, "answers", "'answer' must hold a text, this is empty"),
        ({"prompt": "one?", "answer": "1", "system": "Count."}, "answers", "there is something under 'system'"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong_is_told_in_a_sentence(write, row, train_on, problem):
    with pytest.raises(DataError) as caught:
        read_one(write, row, train_on=train_on)
    assert problem in str(caught.value), str(caught.value)
    assert str(caught.value).count("\n") == 0
