"""A bar that is missed is named, and nothing else is."""

from __future__ import annotations

import json

import pytest

from benchmarks import gym
from benchmarks.gym import Bars, best_constant
from rlhf_ray.environments import reasoning_gym

REACHED = {"start": 0.3, "right": 0.9, "seconds": 400.0, "constant": 0.1}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("start", 0.4, "start is 0.4, not below 0.4"),
        ("right", 0.8, "right is 0.8, not above 0.8"),
        ("seconds", 600.0, "seconds is 600, not below 600"),
        ("constant", 0.2, "constant is 0.2, not below 0.2"),
        ("right", float("nan"), "right is nan, not above 0.8"),
    ],
)
def test_a_bar_that_is_just_missed_is_named_and_no_other(name, value, sentence):
    assert Bars().missed(REACHED) == []
    assert Bars().missed(REACHED | {name: value}) == [sentence]


@pytest.mark.parametrize(("twice", "best"), [(False, 0.6), (True, 0.4)])
def test_the_best_constant_is_the_answer_that_most_questions_have_in_every_turn(tmp_path, monkeypatch, twice, best):
    class Exact:
        def score_answer(self, answer, entry):
            return float(answer == entry)

    monkeypatch.setattr(reasoning_gym, "_verifier", lambda family: Exact())
    answers = ["ab", "aa", "ab", "aa", "ab"]
    rows = [{"answer": answer, "label": {"family": "letters", "entry": answer}} for answer in answers]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert best_constant(path, twice=twice) == pytest.approx(best)


def test_a_run_that_misses_a_bar_fails_with_its_name_and_its_figures(tmp_path, monkeypatch, capsys):
    def train(root, kind, recipe, *overrides):
        run = root / "runs" / recipe
        run.mkdir(parents=True)
        line = {"step": 3.0, "evaluation/pass_at_1": 0.7, "evaluation/pass_at_1_start": 0.3}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(gym, "write_files", lambda *arguments, **settings: None)
    monkeypatch.setattr(gym, "best_constant", lambda path, twice: 0.1)
    monkeypatch.setattr(gym, "_train", train)
    with pytest.raises(RuntimeError, match=r"gym.one_turn misses its bars: right is 0.7, not above 0.8$"):
        gym.learn("gym.one_turn", "gym-grpo", tmp_path, quick=False)
    assert "gym.one_turn.right" in capsys.readouterr().out
    figures = gym.learn("gym.one_turn", "gym-grpo", tmp_path / "quick", quick=True)
    assert set(figures) == {f"gym.one_turn.{name}" for name in ("start", "right", "seconds", "constant")}
    begins = {name.split(".")[-1]: figure.method.split(" of ")[0] for name, figure in figures.items()}
    assert begins == {"start": "share", "right": "share", "seconds": "the whole run", "constant": "mean score"}
