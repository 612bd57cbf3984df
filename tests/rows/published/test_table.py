"""Every layout of published preference data is read as its documentation says, or refused by what it is; no label is guessed.

The rows are made up, in the shapes of the data. Each case says for every pair who wins, by how much, and where it is from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import DemonstrationReader
from rlhf_ray.rows.layouts import Keys, LayoutError
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.prompts import PromptReader
from rlhf_ray.rows.published.table import LAYOUTS, REFUSED, find_layout
from rlhf_ray.rows.read import first_problem, read_file
from rlhf_ray.rows.row import Columns


def said(role: str, *texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for text in texts]


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def words(part: Any) -> str:
    """The text of a side, whether it is a text or messages of one role after the other."""
    return part if isinstance(part, str) else "/".join(message["content"] for message in part)


def pairs_of(write: Any, *rows: dict[str, Any], **keys: Any) -> list[PreferencePair]:
    """The pairs of a file of these rows, as a job with these keys of its data section reads them."""
    data = DataConfig.model_validate({"path": str(write(list(rows))), "evaluation_fraction": 0.0, **keys})
    (source,) = data.files.values()
    reader = data.preference_reader(source)
    assert first_problem(source.rows, reader) == ""
    return list(read_file(source.rows, reader))


def meanings(pairs: list[PreferencePair]) -> list[tuple[Any, ...]]:
    return [(words(pair.prompt), words(pair.chosen), words(pair.rejected), pair.grade) for pair in pairs]


PKU = {"prompt": "q", "response_0": "x", "response_1": "y", "is_response_0_safe": True, "prompt_source": "s"}
SHP = {"history": "q", "human_ref_A": "x", "human_ref_B": "y", "score_A": 1, "score_B": 9, "domain": "d"}
STEER2 = {"prompt": "q", "response_1": "x", "response_2": "y", "preference_statement": "1 is better"}
STEER3 = {"context": said("user", "q"), "response1": "x", "response2": "y", "domain": "code"}
WEBGPT = {"question": {"dataset": "d", "full_text": "q"}, "answer_0": "x", "answer_1": "y", "tokens_0": {"prefix": [1]}}
TLDR = {
    "info": {"post": "p", "title": "t", "subreddit": "r"},
    "summaries": [{"text": " x"}, {"text": " y"}],
    "worker": "w",
}
TLDR_PROMPT = "SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
ONE_HOT = {"prompt": '["q","q2"]', "response_a": '["x", "x2"]', "response_b": ["y", "y2"]}
ARENA = {"conversation_a": talk("q", "x"), "conversation_b": talk("q", "y"), "model_a": "m", "model_b": "n", "turn": 1}
RANKED = [{"answer": "z", "rank": 3.0}, {"answer": "x", "rank": 1.0}, {"answer": "y", "rank": 3.0}]


def one_hot(a: int, b: int, tie: int) -> dict[str, Any]:
    return ONE_HOT | {"winner_model_a": a, "winner_model_b": b, "winner_tie": tie}


def rated(prompt: str, answer: str, rating: float) -> dict[str, Any]:
    return {"prompt": prompt, "response": answer, "helpfulness": rating, "correctness": 9 - rating, "verbosity": 1}


CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[Any, ...]]]] = {
    "PKU-SafeRLHF": (
        [
            PKU | {"better_response_id": 0, "safer_response_id": 1},
            PKU | {"better_response_id": 1, "safer_response_id": 0},
        ],
        [("q", "x", "y", None), ("q", "y", "x", None)],
    ),
    "PKU-SafeRLHF, safety": ([PKU | {"safer_response_id": 1}], [("q", "y", "x", None)]),
    "SHP": ([SHP | {"labels": 0}, SHP | {"labels": 1}], [("q", "y", "x", None), ("q", "x", "y", None)]),
    "HelpSteer2-preference": (
        [STEER2 | {"preference_strength": strength} for strength in (-3, 2, 0)],
        [("q", "x", "y", 3), ("q", "y", "x", 2), ("q", "x", "y", 0)],
    ),
    "HelpSteer3": (
        [STEER3 | {"overall_preference": strength} for strength in (1, -2)],
        [("q", "y", "x", 1), ("q", "x", "y", 2)],
    ),
    "WebGPT comparisons": (
        [WEBGPT | {"score_0": first, "score_1": -first} for first in (0.5, -0.2, 0.0)],
        [("q", "x", "y", 1), ("q", "y", "x", 1), ("q", "x", "y", 0)],
    ),
    "summarize-from-feedback": (
        [TLDR | {"choice": 1}, TLDR | {"choice": 0}],
        [(TLDR_PROMPT, " y", " x", None), (TLDR_PROMPT, " x", " y", None)],
    ),
    "LMSYS arena, 55k": (
        [one_hot(0, 1, 0), one_hot(1, 0, 0), one_hot(0, 0, 1)],
        [("q", "y/q2/y2", "x/q2/x2", 1), ("q", "x/q2/x2", "y/q2/y2", 1), ("q", "x/q2/x2", "y/q2/y2", 0)],
    ),
    "LMSYS arena, 33k, 100k and 140k; MT-Bench": (
        [ARENA | {"winner": winner} for winner in ("model_b", "model_a", "tie", "tie (bothbad)", "both_bad")],
        [("q", "y", "x", 1), ("q", "x", "y", 1), *[("q", "x", "y", 0)] * 3],
    ),
    "Nectar": (
        [{"prompt": "q", "answers": RANKED, "source": ["lmsys", "flan"]}],
        [("q", "x", "z", 1), ("q", "z", "y", 0), ("q", "x", "y", 1)],
    ),
    "UltraFeedback": (
        [
            {
                "instruction": "q",
                "completions": [
                    {"response": "y", "overall_score": 5.0, "fine-grained_score": 9.0, "critique": "c"},
                    {"response": "x", "overall_score": 8.5, "fine-grained_score": 1.0, "critique": "c"},
                    {"response": "z", "overall_score": 5.0, "fine-grained_score": 5.0, "critique": "c"},
                ],
            }
        ],
        [("q", "x", "y", 1), ("q", "y", "z", 0), ("q", "x", "z", 1)],
    ),
    "HelpSteer, HelpSteer2": (
        [rated("q", "y", 1), rated("q", "x", 4), rated("r", "x", 2), rated("r", "y", 2), rated("r", "z", 0)],
        [("q", "x", "y", 1), ("r", "x", "y", 0), ("r", "x", "z", 1), ("r", "y", "z", 1)],
    ),
    "Stack Exchange, paired": ([{"question": "q", "response_j": "x", "response_k": "y"}], [("q", "x", "y", None)]),
    "ms-swift": ([{"messages": talk("q", "x"), "rejected_response": "y"}], [("q", "x", "y", None)]),
    "ms-swift, whole": ([{"messages": talk("q", "x"), "rejected_messages": talk("q", "y")}], [("q", "x", "y", None)]),
}


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_the_winner_of_every_row_is_the_documented_one(write, name):
    rows, expected = CASES[name]
    assert find_layout(rows[0]).name == name
    assert meanings(pairs_of(write, *rows)) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "responses": ["y", "x"], "scores": [1, 3]}, [("q", "x", "y", 1)]),
        ({"instruction": "q", "completions": ["y", "x"], "ranks": [2, 1]}, [("q", "x", "y", 1)]),
        ({"question": "q", "answers": ["x", "y", "z"], "rank": [1, 2, 2]},
         [("q", "x", "y", 1), ("q", "x", "z", 1), ("q", "y", "z", 0)]),
    ],
)  # fmt: skip
def test_lists_of_answers_with_a_number_each(write, row, expected):
    assert meanings(pairs_of(write, row)) == expected
    short = row | {key: numbers[:1] for key, numbers in row.items() if key in ("scores", "ranks", "rank")}
    assert "must be lists of the same length" in first_problem(write([short]), PreferenceReader())


def test_ratings_and_strengths_are_margins_if_asked(write):
    rows = CASES["UltraFeedback"][0]
    assert [pair.margin for pair in pairs_of(write, *rows)] == [None] * 3
    assert [pair.margin for pair in pairs_of(write, *rows, ratings="margins")] == [3.5, 0.0, 3.5]
    assert [pair.margin for pair in pairs_of(write, *CASES["HelpSteer2-preference"][0], ratings="margins")] == [3, 2, 0]
    helpful = pairs_of(write, *CASES["HelpSteer, HelpSteer2"][0], ratings="margins")
    assert [pair.margin for pair in helpful] == [3, 0, 2, 2]


def test_sources_are_taken_along(write):
    assert [pair.source for pair in pairs_of(write, SHP | {"labels": 1})] == ["d"]
    assert [pair.source for pair in pairs_of(write, STEER3 | {"overall_preference": 1})] == ["code"]
    assert {pair.source for pair in pairs_of(write, *CASES["Nectar"][0])} == {"lmsys, flan"}


def test_the_judged_turn_is_the_last(write):
    """MT-Bench keeps both turns in the rows that judge the first."""
    row = {
        "conversation_a": talk("q", "x", "q2", "x2"),
        "conversation_b": talk("q", "y", "q2", "y2"),
        "winner": "model_b",
    }
    assert meanings(pairs_of(write, row | {"turn": 1})) == [("q", "y", "x", 1)]
    assert meanings(pairs_of(write, row | {"turn": 2})) == [("q", "y/q2/y2", "x/q2/x2", 1)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "response_A": "x", "response_B": "y", "winner": "B"}, ("q", "y", "x", 1)),
        ({"question": "q", "response_A": "x", "response_B": "y", "label": "A>B"}, ("q", "x", "y", 1)),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "winner": "model_a"}, ("q", "x", "y", 1)),
        ({"instruction": "q", "output_1": "x", "output_2": "y", "preference": 2}, ("q", "y", "x", 1)),
        ({"instruction": "q", "input": "i", "output_1": "x", "output_2": "y", "label": "1"}, ("q\ni", "x", "y", 1)),
        ({"prompt": "q", "answer_0": "x", "answer_1": "y", "winner": "answer_1"}, ("q", "y", "x", 1)),
        ({"prompt": "q", "completion_a": "x", "completion_b": "y", "choice": "tie"}, ("q", "x", "y", 0)),
    ],
)
def test_a_label_that_names_a_side_by_its_letter_or_number(write, row, expected):
    assert meanings(pairs_of(write, row)) == [expected]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (PKU | {"better_response_id": 2}, "'better_response_id' says which side is better: one of 0, 1 was expected, this is"),
        (PKU | {"better_response_id": None}, "one of 0, 1 was expected, this is empty"),
        (SHP | {"labels": True}, "'labels' says which side is better: one of 1, 0 was expected"),
        (STEER2 | {"preference_strength": 4}, "'preference_strength' must hold a whole number from -3 to 3, this is 4"),
        (STEER2 | {"preference_strength": None}, "nothing under 'preference_strength', which says which side is better"),
        (one_hot(1, 1, 0), "one of 'winner_model_a', 'winner_model_b', 'winner_tie' must be 1 and the others 0"),
        (one_hot(1, 0, 0) | {"response_a": '["x"]'}, "'response_a' holds 1 answers to 2 turns of 'prompt'"),
        (ARENA | {"winner": "model_c"}, "'winner' says which side is better: one of model_a, model_b, tie"),
        (TLDR | {"choice": 1, "info": {"article": "a"}}, "'info' must hold 'subreddit', 'title' and 'post'"),
        (rated("q", "x", 1), "there is one answer to the prompt, and a pair needs two"),
        ({"instruction": "q", "completions": [{"response": "x"}] * 2}, "nothing under 'fine-grained_score'"),
        ({"prompt": "q", "answers": ["x", "y"]}, "'answers' must hold a list of mappings with 'answer' and 'rank'"),
        ({"prompt": "q", "answer_0": "x", "answer_1": "y", "label": 1}, "'label' says which side is better: one of answer_0"),
        ({"prompt": "q", "answer_a": "x", "answer_b": "y", "label": 0}, "'label' says which side is better: one of a, answe"),
        ({"prompt": "q", "answer_a": "x", "answer_b": "y", "label": "a", "winner": "b"}, "'winner' and 'label' name differen"),
        ({"prompt": "q", "completion": "a", "label": True}, "these are single answers that are marked as good or bad (KTO)"),
        ({"messages": talk("q", "a"), "label": False}, "these are single answers that are marked as good or bad (KTO)"),
        ({"prompt": "q", "completions": ["s"], "labels": [True]}, "these are steps of an answer that are marked as right or"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Ties"}, "'chosen' and 'rejected' hold lists of"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, "'rejected' holds a list of texts, and not one answer"),
        ({"prompt": "q", "response_a": "x", "response_b": "y"}, "no 'chosen' and 'rejected'; its keys are 'prompt', 'respon"),
        (SHP | {"labels": 1, "human_ref_A": ""}, "read as SHP: 'chosen' must hold a text or a list of messages, this is emp"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused(write, row, problem):
    """By ``check`` and by the job, with the line."""
    path = write([row])
    with pytest.raises(DataError) as error:
        list(read_file(path, PreferenceReader()))
    assert str(error.value).startswith(f"{path}:1: ") and problem in str(error.value)
    assert problem in first_problem(path, PreferenceReader())


def test_data_without_pairs_are_refused_by_what_they_are():
    for layout in REFUSED:
        with pytest.raises(LayoutError, match=r"these are .*, and not pairs of answers"):
            list(layout.read({}))


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


def test_a_renamed_column_wins_and_one_that_is_nowhere_is_told(write, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    row = SIDES | {"margin": 1, "strength": 2}
    (pair,) = pairs_of(write, row, rename_columns={"strength": "margin"})
    assert pair.margin == 2 and not caplog.text
    (pair,) = pairs_of(write, row, rename_columns={"stength": "margin"})
    assert pair.margin == 1 and "no row up to here has 'stength', which data.rename_columns names" in caplog.text


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


def test_messages_as_json_are_no_demonstration(write):
    row = {"prompt": "q", "answer": json.dumps(said("assistant", "x"))}
    assert "'answer' holds messages written as JSON" in first_problem(write([row]), DemonstrationReader())


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


def test_labels_of_csv(write):
    """Cells are texts there, and whole numbers of a column with gaps end in ``.0``."""
    rows = [SHP | {"labels": "1.0"}, SHP | {"labels": "0"}]
    assert [words(pair.chosen) for pair in pairs_of(write, *rows)] == ["x", "y"]
    assert meanings(pairs_of(write, STEER2 | {"preference_strength": "-2.0"})) == [("q", "x", "y", 2)]


# ---------------------------------------------------------------------------------------------------------------- bad rows


def test_rows_that_lack_what_the_first_has_are_bad_rows(write):
    rows = [SIDES | {"margin": 1.0}, SIDES, SIDES | {"margin": 0.0}]
    assert [pair.margin for pair in pairs_of(write, *rows, bad_rows="drop")] == [1.0, 0.0]


def test_bad_rows_are_dropped_counted_and_named_if_asked(write, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    first = {"chosen": said("assistant", "hello") + talk("q", "x"), "rejected": talk("q", "y")}
    rows = [first, {"chosen": talk("q", "x"), "rejected": talk("q", "y")}, {"chosen": talk("q", ""), "rejected": []}]
    assert len(pairs_of(write, *rows, bad_rows="drop")) == 1
    assert "2 bad rows are left out (data.bad_rows)" in caplog.text
    assert (
        "jsonl:1: message 1 of 'chosen' is of 'assistant'" in caplog.text and "jsonl:3: 'chosen': mess" in caplog.text
    )
    with pytest.raises(DataError, match=r"jsonl:1: .*leave bad rows out with data\.bad_rows=drop"):
        list(read_file(write(rows), PreferenceReader()))
    path, dropping = write([first] * 3), PreferenceReader(drops_bad_rows=True)
    with pytest.raises(DataError, match=r"all 3 rows are wrong, so none is left; the first: .*:1: message 1"):
        list(read_file(path, dropping))
    assert "(3 of the first 3 rows are wrong)" in first_problem(path, dropping)


def test_the_table_in_the_docs_is_the_table_of_layouts():
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text("utf-8")
    lines = ["| data | known by the columns | read as |", "|---|---|---|"]
    for layout in (*LAYOUTS, *REFUSED):
        names = ", ".join(f"`{column}`" for column in layout.columns)
        lines.append(f"| {layout.name} | {names} | {layout.meaning} |")
    table = "\n".join(lines)
    assert f"<!-- layouts -->\n\n{table}\n\n" in page, f"put this table into docs/configuration.md:\n{table}"
