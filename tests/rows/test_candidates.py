"""A prompt has at least one right and one wrong answer, each a text, and as many as its row states."""

from __future__ import annotations

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.rows.candidates import CandidateReader
from rlhf_ray.rows.layouts import Keys
from rlhf_ray.rows.published.comparisons import hold_lists_of_answers
from rlhf_ray.rows.read import read_file

ROW = {
    "id": "ref:4", "prompt": "Name a colour.", "chosen": ["Red."], "rejected": ["Chair.", "", "Table."],
    "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["a", "b", "c", "d"], "subset": "Ties",
    "additional_metadata": None,
}  # fmt: skip


def test_a_row_of_rewardbench_2(write):
    (read,) = read_file(write([ROW]), CandidateReader())
    assert (read.prompt, read.right, read.wrong) == ("Name a colour.", ["Red."], ["Chair.", "", "Table."])
    assert (read.source, read.row_id) == ("Ties", "ref:4") and read.where.endswith(":1")


def test_keys_of_ones_own_and_prompts_that_are_conversations(write):
    row = {"q": [{"role": "user", "content": "why?"}], "good": ["a", "b"], "bad": ["c"], "id": 7, "system": "Be brief."}
    (read,) = read_file(write([row]), CandidateReader(Keys("q", "good", "bad")))
    assert read.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    assert (read.right, read.wrong, read.row_id, read.source) == (["a", "b"], ["c"], "7", "")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"chosen": []}, "'chosen' must hold a list of answers, this is empty"),
        ({"rejected": "Chair."}, "'rejected' must hold a list of answers, this is of type str"),
        ({"rejected": ["a", None]}, "answer 2 of 'rejected' must be a text, this is empty"),
        ({"rejected": [{"role": "assistant", "content": "a"}]}, "answer 1 of 'rejected' must be a text, this is of type dict"),
        ({"num_correct": 2}, "'num_correct' is 2, but there are 1 answers"),
        ({"num_incorrect": 4}, "'num_incorrect' is 4, but there are 3 answers"),
        ({"prompt": 3}, "'prompt' must hold a text"),
    ],
)  # fmt: skip
def test_bad_rows(write, changes, problem):
    with pytest.raises(DataError) as error:
        list(read_file(write([ROW, {**ROW, **changes}]), CandidateReader()))
    assert ":2: " in str(error.value) and problem in str(error.value)


def test_lists_of_texts_on_both_sides_are_candidates_and_conversations_are_not():
    keys = Keys()
    turns = [{"role": "assistant", "content": "a"}]
    assert hold_lists_of_answers(ROW, keys) and not hold_lists_of_answers({"chosen": turns, "rejected": turns}, keys)
    assert not hold_lists_of_answers({"chosen": "a", "rejected": ["b"]}, keys) and not hold_lists_of_answers({}, keys)
