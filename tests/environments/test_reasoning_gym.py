"""No question is in two files; unfit families are refused by name; a score is the verifier's of the stripped answer."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.environments.reasoning_gym import REFUSED, extract_answer, main, make_rows, score
from rlhf_ray.errors import RequestError


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_not_fit_are_refused_by_name_with_the_reason(family):
    with pytest.raises(RequestError, match=f"{family} is not fit for training: {REFUSED[family]}"):
        make_rows(family, 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" 42\n", "42"), ("I think <answer>4</answer>, no, <answer> 5 </answer>.", "5"), ("<answer>open", "<answer>open")],
)
def test_an_answer_is_the_inside_of_its_last_tags_or_all_of_it(text, answer):
    assert extract_answer(text) == answer


def test_a_label_that_is_no_task_is_an_error_and_not_a_reward():
    with pytest.raises(RequestError, match=r"set data\.label_key to label"):
        score(["42"], ["42"], [True])


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(RequestError, match=r"pip install 'rlhf-ray\[gym\]'"):
        make_rows("chain_sum", 1)


def test_no_question_is_in_two_files_and_the_verifier_judges_rows_from_disk(tmp_path):
    pytest.importorskip("reasoning_gym")
    settings = ["min_terms=2", "max_terms=2", "min_digits=1", "max_digits=1"]
    main(["chain_sum", str(tmp_path), "--demonstrations", "60", "--train", "60", "--test", "40", *settings])
    files = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("demonstrations", "train", "test")
    ]
    questions = [row["prompt"].casefold() for rows in files for row in rows]
    assert len(questions) == len(set(questions)) == 160, "of 300 items of this family about 160 are different"
    rows = files[2]
    labels = [row["label"] for row in rows]
    assert score([f" {row['answer']}\n" for row in rows], labels, [True] * 40) == [1.0] * 40
    assert score([row["answer"] for row in rows], labels, [False] * 40) == [0.0] * 40
    constant = max(sum(score([row["answer"]] * 40, labels, [True] * 40)) / 40 for row in rows)
    assert constant < 0.2


def test_a_family_that_is_too_small_says_so():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(RequestError, match="different questions in"):
        make_rows("count_bits", 100, max_n=31)
