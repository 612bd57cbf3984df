"""Columns beside two sides: a label is never passed over, ratings and prompts are read; bad rows are dropped if asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import DemonstrationReader
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.prompts import PromptReader
from rlhf_ray.rows.read import first_problem, read_file
from rlhf_ray.rows.row import Columns
from tests.rows.published.pairs import meanings, pairs_of, said, talk, words

# ---------------------------------------------------------------------------------- columns beside a chosen and a rejected

SIDES = {"prompt": "q", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "column",
    [
        {"labels": 1},
        {"label": "B"},
        {"better_response_id": 0},
        {"safer_response_id": 1},
        {"winner_model_a": 0},
        {"winnerModelA": 0},
        {"winner": "model_b"},
        {"overall_preference": -2},
        {"preference_strength": 1.0},
        {"human_preference": True},
        {"chosen_index": 1},
        {"is_tie": False},
        {"vote": 2},
        {"swapped": True},
    ],
    ids=lambda column: next(iter(column)),
)
def test_a_column_that_may_be_the_label_is_never_passed_over(write, column):
    (name,) = column
    path = write([SIDES | column])
    for reader in (PreferenceReader(), PreferenceReader(Keys("prompt", "x_0", "x_1"))):
        renamed = {"x_0": "x", "x_1": "y", "prompt": "q"} | column
        rows = path if reader.keys == Keys() else write([renamed], "renamed.jsonl")
        with pytest.raises(DataError, match=rf"jsonl:1: '{name}' may say which side is better, and is not read.*"
                                            rf"data\.ignore_columns=\[{name}\]"):  # fmt: skip
            list(read_file(rows, reader))
    assert meanings(pairs_of(write, SIDES | column, ignore_columns=[name])) == [("q", "x", "y", None)]


def test_columns_that_rate_two_named_sides_are_never_passed_over(write):
    row = {"prompt": "q", "answer_0": "x", "answer_1": "y", "score_0": 0.1, "score_1": 0.9}
    reader = PreferenceReader(Keys("prompt", "answer_0", "answer_1"))
    assert "'score_0' may say which side is better" in first_problem(write([row]), reader)


@pytest.mark.parametrize(
    "column",
    [
        {"score": [9, 8]},
        {"winner": [1, 0]},
        {"preference_labels": {"judge": "response_b"}},
        {"choose-best-response": [{"value": 2}]},
        {"outcome": 1},
        {"helpfulness_a": 1},
        {"annotation": "response_b"},
        {"conclusion": "B>A"},
        {"human": "B"},
        {"gpt4": "model_b"},
        {"reviewer": "Second"},
        {"reason": "The other one is wrong in its second step, so I prefer this one: [[B]]"},
    ],
    ids=lambda column: next(iter(column)),
)
def test_of_sides_whose_names_say_nothing_a_value_that_names_one_may_be_the_label(write, column):
    (name,) = column
    row, reader = (
        {"prompt": "q", "response_a": "x", "response_b": "y"},
        PreferenceReader(Keys("prompt", "response_a", "response_b")),
    )
    with pytest.raises(DataError, match=rf"'{name}' may say which side is better"):
        list(read_file(write([row | column]), reader))
    for other in (
        {"model": "b-large"},
        {"lengths": [3, 5]},
        {"id": 2},
        {"comment": "The first is shorter."},
        {"turns": "1"},
    ):
        assert meanings(read_file(write([row | other]), reader)) == [("q", "x", "y", None)]


@pytest.mark.parametrize("turn", [1, 1.0, "1"])
def test_the_judged_turn_counts_however_a_table_writes_it(write, turn):
    row = {"conversation_a": talk("q", "x", "more", "x2"), "conversation_b": talk("q", "y", "more", "y2"), "turn": turn}
    assert meanings(pairs_of(write, row | {"winner": "model_b"})) == [("q", "y", "x", 1)]
    assert meanings(pairs_of(write, row | {"winner": "tie (inconsistent)"})) == [("q", "x", "y", 0)]
    problem = first_problem(write([row | {"winner": "model_b", "turn": 0}]), PreferenceReader())
    assert "'turn' is the number of the judged turn, from 1, this is 0" in problem


@pytest.mark.parametrize(
    "column",
    [
        {"chosen_model": "m", "rejected_model": "n", "id": 7, "prompt_id": "a", "num_turns": 2, "dataset": "d"},
        {"preference_elaboration": "The first one is much better, since it says what was asked for."},
        {"label": None, "winner": ""},
        {"individual_preference": [{"score": -2}]},
        {"messages": talk("q", "x"), "chosen_score": 5.0},
    ],
    ids=lambda column: next(iter(column)),
)
def test_other_columns_do_not_matter(write, column):
    assert meanings(pairs_of(write, SIDES | column)) == [("q", "x", "y", None)]


@pytest.mark.parametrize("names", ["score_{}", "{}_score", "{}_rating", "rating_{}", "{}-avg-rating", "{}Score"])
def test_ratings_beside_the_sides(write, names):
    """Equal ratings are a tie, a better rating of the worse side is refused, and their difference is a margin if asked for."""

    def row(chosen: float, rejected: float) -> dict[str, Any]:
        return SIDES | {names.format("chosen"): chosen, names.format("rejected"): rejected}

    rows = [row(8.0, 3.5), row(4.0, 4.0)]
    assert [(pair.grade, pair.margin) for pair in pairs_of(write, *rows)] == [(1, None), (0, None)]
    assert [(pair.grade, pair.margin) for pair in pairs_of(write, *rows, ratings="margins")] == [(1, 4.5), (0, 0)]
    ignored = pairs_of(write, *rows, row(1.0, 2.0), ratings="ignore")
    assert [(pair.grade, pair.margin) for pair in ignored] == [(None, None)] * 3
    assert "is below" in first_problem(write([row(1.0, 2.0)]), PreferenceReader())
    several = row(4.0, 4.0) | {"chosen_reward": 2, "rejected_reward": 1}
    assert "differ in which side is better" in first_problem(write([several]), PreferenceReader())
    assert "data.ratings=margins asks for" in first_problem(write([SIDES]), PreferenceReader(ratings="margins"))


def test_a_renamed_column_wins_and_one_that_is_nowhere_is_told(write, project_log):
    row = SIDES | {"margin": 1, "strength": 2}
    (pair,) = pairs_of(write, row, rename_columns={"strength": "margin"})
    assert pair.margin == 2 and not project_log.getvalue()
    (pair,) = pairs_of(write, row, rename_columns={"stength": "margin"})
    assert (
        pair.margin == 1
        and "no row up to here has 'stength', which data.rename_columns names" in project_log.getvalue()
    )


def test_columns_can_be_renamed_and_left_out(write):
    row = SIDES | {"grade": "5th", "strength": 2, "system": "s"}
    assert "'system'" in first_problem(write([row]), PreferenceReader())
    reader = PreferenceReader(columns=Columns(ignored=("system",)))
    assert "'grade' must hold a finite number, this is a str that is none" in first_problem(write([row]), reader)
    (pair,) = pairs_of(write, row, ignore_columns=["grade", "system"], rename_columns={"strength": "margin"})
    assert (pair.margin, pair.grade) == (2.0, None)


# ------------------------------------------------------------------------------------------------- prompts beside the sides


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "q", "input": ""}, "q"),
        ({"instruction": "q", "input": "i"}, "q\ni"),
        ({"question": "q"}, "q"),
        ({"query": "q"}, "q"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "q"),
        ({"messages": talk("q", "a", "q2")}, "q/a/q2"),
        ({"trajectory": [{"from": "user", "value": "q"}], "task": "Coding"}, "q"),
        ({"instruction": "q", "input": "i", "history": [["h", "a"]]}, "h/a/q\ni"),
        ({"instruction": "q", "history": []}, "q"),
    ],
)
@pytest.mark.parametrize("form", ["text", "message", "messages"])
def test_the_prompt_of_two_answers_may_stand_in_other_columns(write, row, prompt, form):
    sides = {"chosen": "it is x", "rejected": "it is y"}  # which begin alike, so that a prompt could be made of that
    if form != "text":
        sides = {key: said("assistant", text) for key, text in sides.items()}
    if form == "message":
        sides = {key: {"from": "gpt", "value": side[0]["content"]} for key, side in sides.items()}
    assert meanings(pairs_of(write, row | sides)) == [(prompt, "it is x", "it is y", None)]


def test_two_columns_that_may_be_the_prompt(write):
    row = {"question": "q", "context": "c", "chosen": "x", "rejected": "y"}
    assert "'question' and 'context' may be the prompt" in first_problem(write([row]), PreferenceReader())
    assert meanings(pairs_of(write, row, prompt_key="question")) == [("q", "x", "y", None)]
    assert meanings(pairs_of(write, row, ignore_columns=["context"])) == [("q", "x", "y", None)]


def test_whole_sides_need_no_prompt_beside_them(write):
    row = {"messages": talk("q", "x"), "question": "other", "chosen": talk("q", "x"), "rejected": talk("q", "y")}
    assert meanings(pairs_of(write, row)) == [("q", "x", "y", None)]
    ask = "\n\nHuman: q\n\nAssistant:"
    assert meanings(pairs_of(write, {"question": "other", "chosen": f"{ask} x", "rejected": f"{ask} y"})) == [
        (ask, " x", " y", None)
    ]


@pytest.mark.parametrize(
    "write_as",
    [
        json.dumps,
        lambda cell: cell[0],
        lambda cell: json.dumps(cell[0]),
        lambda cell: [json.dumps(message) for message in cell],
        lambda cell: {
            "role": [message["role"] for message in cell],
            "content": [message["content"] for message in cell],
        },
    ],
)
def test_messages_written_as_json_or_alone(write, write_as):
    row = {"prompt": write_as(said("user", "q")), "chosen": write_as(said("assistant", "x"))}
    assert meanings(pairs_of(write, row | {"rejected": said("assistant", "y")})) == [("q", "x", "y", None)]


@pytest.mark.parametrize("cell", [repr(said("assistant", "x")), "[{'content': array([1]), 'role': 'user'}]"])
def test_messages_as_python_writes_them_are_refused(write, cell):
    problem = first_problem(write([{"prompt": "q", "chosen": cell, "rejected": cell}]), PreferenceReader())
    assert "'chosen' must hold a text or a list of messages, these are messages as Python writes them" in problem
    assert "json.dumps" in problem
    for reader in (PromptReader(Keys("chosen")), DemonstrationReader("prompt", "chosen")):
        assert "these are messages as Python writes them" in first_problem(
            write([{"prompt": "q", "chosen": cell}]), reader
        )


def test_messages_as_json_are_a_demonstration(write):
    row = {"prompt": "q", "answer": json.dumps(said("assistant", "x"))}
    (read,) = read_file(write([row]), DemonstrationReader())
    assert read.messages == (*said("user", "q"), *said("assistant", "x"))


def test_lists_of_turns_as_json_are_refused_without_their_labels(write):
    row = {"prompt": '["q"]', "chosen": '["x"]', "rejected": '["y"]'}
    assert "hold lists of turns written as JSON" in first_problem(write([row]), PreferenceReader())
    assert meanings(pairs_of(write, row | {"prompt": "List it."})) == [("List it.", '["x"]', '["y"]', None)]


def test_a_text_that_repeats_the_prompt(write):
    dialogue = "\n\nHuman: q\n\nAssistant:"
    twice = {"prompt": dialogue, "chosen": f"{dialogue} x", "rejected": f"{dialogue} y"}
    assert meanings(pairs_of(write, twice)) == [(dialogue, " x", " y", None)]
    unclear = {"prompt": "Say it.", "chosen": "Say it. x", "rejected": "Say it. y"}
    assert "data.prompt_in_sides=true" in first_problem(write([unclear]), PreferenceReader())
    assert meanings(pairs_of(write, unclear, prompt_in_sides=True)) == [("Say it.", " x", " y", None)]
    assert meanings(pairs_of(write, unclear, prompt_in_sides=False)) == [("Say it.", "Say it. x", "Say it. y", None)]


def test_a_prompt_that_is_no_turn_of_whole_sides(write):
    sides = {"chosen": talk("q", "x"), "rejected": talk("q", "y")}
    assert meanings(pairs_of(write, sides | {"prompt": " q\n"})) == [("q", "x", "y", None)], "blanks do not count"
    assert meanings(pairs_of(write, sides | {"prompt": said("user", "q ")})) == [("q", "x", "y", None)]
    problem = first_problem(write([sides | {"prompt": "Hi. q"}]), PreferenceReader())
    assert "'prompt' is no message of the user in 'chosen'" in problem and "data.ignore_columns=[prompt]" in problem
    assert meanings(pairs_of(write, sides | {"prompt": "Hi. q"}, ignore_columns=["prompt"])) == [("q", "x", "y", None)]


def test_dialogues_as_text_become_turns_if_asked(write):
    ask = "\n\nHuman: Hi\n\nAssistant: Oh\n\nHuman: q\n\nAssistant:"
    whole = {"chosen": f"{ask} x", "rejected": f"{ask} y\n\nHuman: So?\n\nAssistant: z"}
    (pair,) = pairs_of(write, whole, apply_chat_template=True)
    assert (pair.prompt, pair.chosen) == (tuple(talk("Hi", "Oh", "q")), tuple(said("assistant", "x")))
    assert [message["role"] for message in pair.rejected] == ["assistant", "user", "assistant"]
    beside = {"prompt": f"{ask} ", "chosen": "x", "rejected": "y"}
    (pair,) = pairs_of(write, beside, apply_chat_template=True)
    assert (pair.prompt, words(pair.chosen), words(pair.rejected)) == (tuple(talk("Hi", "Oh", "q")), "x", "y")
    two = {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"}
    assert "message 2 of 'chosen' is of 'user'" in first_problem(write([two]), PreferenceReader(turns=True))


# ---------------------------------------------------------------------------------------------------------------- bad rows


def test_rows_that_lack_what_the_first_has_are_bad_rows(write):
    rows = [SIDES | {"margin": 1.0}, SIDES, SIDES | {"margin": 0.0}]
    assert [pair.margin for pair in pairs_of(write, *rows, bad_rows="drop")] == [1.0, 0.0]


def test_bad_rows_are_dropped_counted_and_named_if_asked(write, project_log):
    first = {"chosen": said("assistant", "hello") + talk("q", "x"), "rejected": talk("q", "y")}
    rows = [first, {"chosen": talk("q", "x"), "rejected": talk("q", "y")}, {"chosen": talk("q", ""), "rejected": []}]
    assert len(pairs_of(write, *rows, bad_rows="drop")) == 1
    said_of_them = project_log.getvalue()
    assert "2 bad rows are left out (data.bad_rows)" in said_of_them
    assert "jsonl:1: message 1 of 'chosen' is of 'assistant'" in said_of_them
    assert "jsonl:3: 'chosen': mess" in said_of_them
    with pytest.raises(DataError, match=r"jsonl:1: .*leave bad rows out with data\.bad_rows=drop"):
        list(read_file(write(rows), PreferenceReader()))
    path, dropping = write([first] * 3), PreferenceReader(drops_bad_rows=True)
    with pytest.raises(DataError, match=r"all 3 rows are wrong, so none is left; the first: .*:1: message 1"):
        list(read_file(path, dropping))
    assert "(3 of the first 3 rows are wrong)" in first_problem(path, dropping)
