"""A label is what one column of its row holds; columns that differ are refused; a number becomes text and nothing else is
changed; a label that a verifier cannot compare with is refused with its row.
"""

from __future__ import annotations

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rows.labels import LABEL_COLUMNS, LabelReader, number_label_problem
from rlhf_ray.rows.prompts import PromptReader, read_prompts
from rlhf_ray.rows.read import first_problem, read_file
from rlhf_ray.rows.row import LayoutError, Row

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "2 + 3?"}],
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"answer": "It is 5.\n#### 5", "index": 0},
}


def label(values, other_columns=("prompt",), **settings):
    return LabelReader(**settings).read(Row(values, "rows.jsonl:1"), other_columns)


@pytest.mark.parametrize("column", LABEL_COLUMNS[:-1])
def test_every_known_column_is_a_label(column):
    assert label({"prompt": "q", column: "5"}) == "5"
    assert label({"prompt": "q", column: ""}) is None
    assert label({"prompt": "q", column: "5"}, other_columns=("prompt", column)) is None, "it is the prompt"


def test_rows_of_verl(write):
    (prompt,) = read_prompts(write([VERL]))
    assert (prompt.label, prompt.source) == ("5", "openai/gsm8k")
    (prompt,) = read_prompts(write([VERL]), label_key="extra_info.answer")
    assert prompt.label == "It is 5.\n#### 5"


def test_a_column_with_a_dot_in_its_name_comes_before_a_field():
    assert label({"a.b": "1", "a": {"b": "2"}}, key="a.b") == "1"
    assert label({"a": {"b": {"c": 7}}}, key="a.b.c") == "7"
    assert label({"a": {"b": "text"}}, key="a.b.c") is None
    assert label({"a": '{"b": {"c": 7}}'}, key="a.b.c") == "7", "a table holds mappings as JSON"
    assert label({"a": '{"b": '}, key="a.b") is None


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("x", "x"),
        (5, "5"),
        (2.5, "2.5"),
        (["5"], ["5"]),
        (True, True),
        ({"a": 1}, {"a": 1}),
        (0, "0"),
        (7.0, "7"),
        (-0.5, "-0.5"),
    ],
)
def test_a_number_becomes_text_and_nothing_else_is_changed(value, read):
    found = label({"label": value})
    assert found == read and type(found) is type(read)


def test_a_number_that_a_table_lacks_is_no_label():
    assert label({"label": float("nan")}) is None
    assert label({"label": float("nan"), "answer": "7"}) == "7"
    assert label({"label": 7.0, "answer": "7"}) == "7", "they say the same"


def test_columns_that_differ_are_refused_by_name_unless_nothing_reads_labels():
    row = {"prompt": "q", "answer": "It is 5.", "solution": "5"}
    with pytest.raises(LayoutError, match="'answer' and 'solution' could each be the label, and they differ") as error:
        label(row)
    assert "data.label_key" in error.value.way_out
    assert label(row, key="solution") == "5"
    assert label(row, used=False) is None
    assert label({"answer": 5, "solution": "5", "ground_truth": None}) == "5", "they say the same"


COMPARES = "no label, but the reward function exact_match compares answers with it: "


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        ({"prompt": "q"}, {}, COMPARES + "there is nothing under 'label', "),
        ({"q": 1}, {"key": "solution"}, "no 'solution', which data.label_key names; its keys are 'q'"),
        ({"solution": ""}, {"key": "solution"}, COMPARES + "there is nothing under 'solution'"),
        ({"label": ["5"]}, {}, "the label under 'label' must be one text or number, this is of type list"),
        ({"label": False}, {}, "the label under 'label' must be one text or number, this is a truth value"),
        ({"label": {"target": "5"}}, {}, "this is of type dict"),
    ],
)  # fmt: skip
def test_what_a_verifier_cannot_compare_with_is_refused(row, settings, problem):
    with pytest.raises(LayoutError, match=problem) as error:
        label(row, compared="text", verifier="exact_match", **settings)
    assert "data.label_key" in error.value.way_out


@pytest.mark.parametrize(
    "text",
    [
        "5",
        5,
        "It is 4 + 1.\n#### 5",
        "#### 5 of 7",
        "-1,250.5",
        "$18",
        r"\boxed{12}",
        "x = 4",
        "12 km",
        "+5",
        "**12**",
        "It is 7.",
    ],
)
def test_labels_that_say_one_number(text):
    assert label({"label": text}, compared="number", verifier="gsm8k") == str(text)
    assert number_label_problem(str(text)) == ""


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("many", "no number"),
        (r"$\frac{1}{2}$", "2 numbers"),
        ("1/2", "2 numbers"),
        (r"$\sqrt{2}$", "a formula"),
        (r"2\pi", "a formula"),
        ("3x", "a formula"),
        ("x^2", "a formula"),
        ("x + 2", "a formula"),
        ("√2", "a formula"),
        ("7 ####", "no number"),
        (" ", "no"),
    ],
)
def test_labels_that_do_not(text, held):
    with pytest.raises(LayoutError, match=f"holds {held}"):
        label({"label": text}, compared="number", verifier="gsm8k")


def test_check_and_train_refuse_the_same_rows(write):
    path = write([{"prompt": "q", "label": "1"}, {"prompt": "q"}, {"prompt": "q", "label": "x"}])
    reader = PromptReader(labels=LabelReader(compared="number", verifier="gsm8k"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: no label, but the reward function gsm8k"):
        list(read_file(path, reader))
    assert first_problem(path, reader).startswith(f"{path}:2: no label, but the reward function gsm8k")
    assert "2 of the first 3 rows are wrong" in first_problem(path, reader)
