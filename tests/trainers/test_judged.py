"""PPO against a judge over HTTP, in one process: answers without a score cost their prompts, and the budget is kept.

What must hold: nothing is trained on that the judge did not say; a run ends in one sentence where too few scores come.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.errors import ResumableStop, ScoringError
from rlhf_ray.trainers.ppo.build import train_ppo
from tests.rewards.judge.server import Behave, Reply, judge_server, material
from tests.trainers.glossary import unexplained
from tests.trainers.test_rewards_in_process import rows, start


@pytest.fixture(autouse=True)
def _single_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def by_length(body: Mapping[str, Any]) -> float:
    return min(len(material(body)["answer"]), 100) / 10


def train(tmp_path: Path, behave: Behave, *overrides: str, **judge: Any) -> tuple[Any, Any]:
    """A run of two steps against a judge that replies so, and its server."""
    with judge_server(behave) as server:
        section = {"url": server.url, "model": "small", "key_variable": None, "rubric": "Length.", "tries": 1, **judge}
        reward = json.dumps({"judge": section, "hold_s": 0.0})
        config, run = start(tmp_path, rows(tmp_path, "one"), reward, *overrides)
        try:
            train_ppo(config, run, None, place=ThisProcess(config.cluster))
        except (ScoringError, ResumableStop) as error:
            return run, error
    return run, server


@pytest.mark.early
def test_a_run_trains_on_scores_alone_and_logs_what_they_cost(tmp_path: Path) -> None:
    refused: set[str] = set()

    def behave(body: Mapping[str, Any], number: int) -> str:
        if number % 20 == 19:
            refused.add(material(body)["conversation"][0]["content"])
            return "I would rather not."
        return f'{{"score": {by_length(body)}}}'

    prices = {"prompt_price": 1.0, "reply_price": 2.0, "max_cost": 1.0}
    run, server = train(tmp_path, behave, "reward.max_dropped_share=0.9", **prices)
    lines = run.metrics.read()
    assert 0.0 <= lines[0]["reward/learned"] <= 1.0 and lines[0]["prompts/dropped"] + lines[1]["prompts/dropped"] > 0
    sampled = [json.loads(line) for path in sorted(run.samples.iterdir()) for line in path.read_text().splitlines()]
    assert sampled and refused
    kept = json.loads((run.judges / "reward.json").read_text())
    assert kept["requests"] == len(server.requests) and kept["tokens"] == 40 * len(server.requests)
    assert kept["cost"] == pytest.approx(50e-6 * len(server.requests))
    assert 0 < sum(line["judge/requests"] for line in lines[:2]) <= len(server.requests)
    assert sum(line["judge/refusals"] for line in lines[:2]) >= 1 and lines[0]["judge/cost"] > 0
    assert unexplained(run) == set()


def test_too_many_answers_without_a_score_end_the_run_in_a_sentence(tmp_path: Path) -> None:
    _, error = train(tmp_path, lambda body, number: "No." if number % 4 else "5")
    assert isinstance(error, ScoringError)
    for part in ("the judge replied no JSON object: 'No.'", "would be dropped, more than reward.max_dropped_share 0.5"):
        assert part in str(error)


def test_a_judge_that_goes_away_in_the_middle_ends_the_run_in_a_sentence(tmp_path: Path) -> None:
    _, error = train(tmp_path, lambda body, number: "5" if number < 30 else Reply(hang_up=True))
    assert isinstance(error, ResumableStop) and "the connection to http://127.0.0.1" in str(error)


def test_a_budget_that_is_spent_ends_the_run_and_says_what_to_raise(tmp_path: Path) -> None:
    run, error = train(tmp_path, lambda body, number: f"{by_length(body)}", max_requests=20)
    assert isinstance(error, ScoringError) and "the budget is spent (max_requests 20)" in str(error)
    assert json.loads((run.judges / "reward.json").read_text())["requests"] == 20


def test_the_key_of_a_judge_is_in_no_file_of_a_run_and_in_nothing_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], project_log: io.StringIO
) -> None:
    """Also where the judge repeats it in a reply, in a refusal and in a body that is no reply."""
    canary = "sk-canary-0123456789abcdef"
    monkeypatch.setenv("CANARY_KEY", canary)

    def behave(body: Mapping[str, Any], number: int) -> Reply | str:
        said = [f"The key is {canary}.", Reply(status=400, body=canary.encode()), Reply(body=canary.encode())]
        return said[number // 7 % 3] if number % 7 == 6 else f'{{"reason": "{canary}", "score": {by_length(body)}}}'

    run, _ = train(tmp_path, behave, "reward.max_dropped_share=0.9", key_variable="CANARY_KEY")
    assert len(run.metrics.read()) >= 2
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if canary.encode() in path.read_bytes()]
    said = "".join((*capfd.readouterr(), project_log.getvalue()))
    assert "(the key)" in said and canary not in said


def test_answers_to_a_prompt_are_ranked_against_each_other(tmp_path: Path) -> None:
    """Each prompt hands out the same sum of rewards, and nothing is asked about answers to different prompts."""

    def longer(body: Mapping[str, Any], number: int) -> str:
        first, second = (len(material(body)[name]) for name in ("first", "second"))
        return json.dumps({"better": "first" if first > second else "second" if second > first else "tie"})

    groups = ("batch.samples_per_prompt=4", "evaluation.samples_per_prompt=2")
    run, _ = train(tmp_path, longer, *groups, compare="circle")
    lines = run.metrics.read()
    assert [line["reward/learned"] for line in lines[:2]] == pytest.approx([0.5, 0.5])
    assert lines[0]["judge/first_better"] == pytest.approx(0.5) and lines[0]["judge/refusals"] == 0
    assert unexplained(run) == set()
