"""1.0 for a right answer and 0.0 for any other; a missing label is an error, never a 0."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.verifiers import exact_match, gsm8k
from rlhf_ray.rows.labels import final_number
from rlhf_ray.world.gold import world_arithmetic

WORKED = "She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl.gz"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (WORKED, "7"),
        ("#### 1,234", "1234"),
        ("####-5", "-5"),
        ("#### $10.50", "10.5"),
        ("#### 18.00 dollars for 3 of them", "18"),
        ("It costs 3 dollars, so all 4 cost $1,200.", "1200"),
        ("the answer is -2.5", "-2.5"),
        ("#### 3\n#### 4", "4"),
        ("no number", None),
        ("3 apples\n####", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "finished", "right"),
    [
        ("#### 7", True, 1.0),
        ("so it is 7.", True, 1.0),
        ("7.0", True, 1.0),
        ("#### 8", True, 0.0),
        ("7 or 8", True, 0.0),
        ("no idea", True, 0.0),
        ("#### 7", False, 0.0),
        ("#### 77", True, 0.0),
    ],
)
def test_an_answer_is_right_when_its_final_number_is_the_labels(response: str, finished: bool, right: float) -> None:
    assert gsm8k([response, response], [WORKED, "7"], [finished, finished]) == [right, right]


@pytest.mark.parametrize("verify", [gsm8k, exact_match, world_arithmetic])
def test_a_prompt_without_a_label_is_an_error(verify: object) -> None:
    with pytest.raises(ScoringError, match="the prompt has no label to compare with"):
        verify(["7"], [None], [True])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("label", "problem"),
    [("many", "'many' holds no number"), ("1/2", "'1/2' holds 2 numbers"), (["7"], "must be one text or number")],
)
def test_a_label_that_says_no_number_is_an_error(label: object, problem: str) -> None:
    with pytest.raises(ScoringError, match=problem):
        gsm8k(["7"], [label], [True])


@pytest.mark.parametrize("label", [["yes"], True])
def test_a_label_that_is_no_text_is_an_error(label: object) -> None:
    with pytest.raises(ScoringError, match="must be one text or number"):
        exact_match(["yes"], [label], [True])


def test_exact_match_overlooks_space_around() -> None:
    assert exact_match([" yes\n", "Yes", "yes"], ["yes"] * 3, [True, True, False]) == [1.0, 0.0, 0.0]


@pytest.mark.skipif(not SHARED.exists(), reason="no GSM8K here")
def test_every_worked_answer_of_gsm8k_is_right_by_its_own_label() -> None:
    with gzip.open(SHARED, "rt") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert len(answers) > 600
    assert set(gsm8k(answers, answers, [True] * len(answers))) == {1.0}
    shifted = answers[1:] + answers[:1]
    assert sum(gsm8k(answers, shifted, [True] * len(answers))) < 0.1 * len(answers)
