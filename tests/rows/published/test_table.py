"""Every layout of published preference data is read as its documentation says, or refused by what it is; no label is guessed.

The rows are made up, in the shapes of the data. Each case says for every pair who wins, by how much, and where it is from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rows.layouts import LayoutError
from rlhf_ray.rows.preferences import PreferenceReader
from rlhf_ray.rows.published.table import LAYOUTS, REFUSED, find_layout
from rlhf_ray.rows.read import first_problem, read_file
from tests.rows.published.pairs import meanings, pairs_of, said, talk, words

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
    with pytest.raises(LayoutError) as refused:
        list(next(layout for layout in REFUSED if layout.name == "KTO").read({}))
    assert refused.value.way_out.endswith("or learn from the labels in a job of kind dpo, with loss.name=kto")


def test_labels_of_csv(write):
    """Cells are texts there, and whole numbers of a column with gaps end in ``.0``."""
    rows = [SHP | {"labels": "1.0"}, SHP | {"labels": "0"}]
    assert [words(pair.chosen) for pair in pairs_of(write, *rows)] == ["x", "y"]
    assert meanings(pairs_of(write, STEER2 | {"preference_strength": "-2.0"})) == [("q", "x", "y", 2)]


def test_the_table_in_the_docs_is_the_table_of_layouts():
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text("utf-8")
    lines = ["| data | known by the columns | read as |", "|---|---|---|"]
    for layout in (*LAYOUTS, *REFUSED):
        names = ", ".join(f"`{column}`" for column in layout.columns)
        lines.append(f"| {layout.name} | {names} | {layout.meaning} |")
    table = "\n".join(lines)
    assert f"<!-- layouts -->\n\n{table}\n\n" in page, f"put this table into docs/configuration.md:\n{table}"
