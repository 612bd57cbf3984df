"""No question is in two files; unfit families are refused by name; a score is the verifier's of the stripped answer."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_ray.environments import reasoning_gym
from rlhf_ray.environments.protocol import Answer, Task
from rlhf_ray.environments.reasoning_gym import (
    REFUSED,
    RIGHT,
    WRONG,
    Twice,
    extract_answer,
    main,
    make_rows,
    score,
    second_turns,
    with_careless,
)
from rlhf_ray.errors import RequestError

ROWS = [
    {"prompt": f"{word}\n", "answer": word[::-1], "label": {"family": "spelled", "entry": {"answer": word[::-1]}}}
    for word in ("sun", "moon", "noon")
]


class Spelled:
    """A verifier as families of the package have them, without the package."""

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.2


@pytest.fixture
def spelled(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "_verifier", lambda family: Spelled())


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


def test_every_question_has_its_right_demonstration_and_the_same_number_of_careless_ones():
    shown = Counter((row["prompt"], row["answer"]) for row in with_careless(ROWS, 2))
    assert shown == {
        ("sun\n", "nus"): 1, ("sun\n", "sun"): 2, ("moon\n", "noom"): 1, ("moon\n", "moon"): 2, ("noon\n", "noon"): 3
    }  # fmt: skip
    assert with_careless(ROWS, 0) == ROWS


def play(*answers):
    environment = Twice()
    environment.reset(Task("", ROWS[0]["label"]))
    return [(turn.reward, turn.done, turn.observation) for turn in map(environment.step, answers)]


@pytest.mark.parametrize(
    ("first", "second", "rewards"),
    [
        ("nus", "sun", [0.5, 0.5]),
        ("nus", "nus", [0.5, 0.0]),
        ("sun", "nus", [0.0, 0.25]),
        ("sun", "sun", [0.0, 0.0]),
    ],
)
def test_full_marks_need_both_turns_and_what_the_second_asks_for_follows_from_the_first(
    spelled, first, second, rewards
):
    turns = play(Answer(first, True), Answer(second, True))
    assert [turn[0] for turn in turns] == rewards
    assert [turn[1] for turn in turns] == [False, True]
    assert turns[0][2] == (RIGHT if first == "nus" else WRONG)


def test_an_answer_that_was_cut_is_wrong_in_either_turn(spelled):
    assert play(Answer("nus", False))[0] == (0.0, False, WRONG)
    assert play(Answer("nus", True), Answer("sun", False))[1][0] == 0.0


def test_second_turns_are_shown_after_a_right_and_after_a_careless_answer_and_are_right(spelled):
    assert [(row["prompt"], row["answer"]) for row in second_turns(ROWS, "#")] == [
        (f"sun\nnus#{RIGHT}", "sun"),
        (f"sun\nsun#{WRONG}", "nus"),
        (f"moon\nnoom#{RIGHT}", "moon"),
        (f"moon\nmoon#{WRONG}", "noom"),
        (f"noon\nnoon#{RIGHT}", "noon"),
    ]
