"""Best-of-n picks by the shaped rewards that a run trains on, and counts wins against the start's answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.config.loading import load_config
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.monitoring.report.summary import BestOf
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.trainers.ppo.algorithm import make_preparation
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer
from rlhf_ray.trainers.ppo.evaluation import PpoEvaluation
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason

REWARDS = [9.0, 2.0, 1.0, 0.0]
"""Of four answers to one prompt: the reward model likes best the one that was cut off."""
GOLD = [0.0, 1.0, 0.5, 0.25]


def make_evaluation(tmp_path: Path, *overrides: str) -> PpoEvaluation:
    """An evaluation whose one prompt has four answers, each one token long."""
    config: Any = load_config("demo-ppo", ["evaluation.best_of=4", *overrides])
    trajectories = TrajectoryBatch.from_sequences(
        [[5, 6]] * 4,
        action_mask=[[False, True]] * 4,
        finish_reason=torch.tensor([FinishReason.LENGTH, *[FinishReason.STOP] * 3], dtype=torch.int8),
    )
    samples = [TextSample(0, index, "p", "r", None, index > 0, (5, 6)) for index in range(4)]
    experience: Any = SimpleNamespace(
        decode=lambda *_: samples,
        score=lambda _: list(map(ScoreResult.of, REWARDS)),
        rows_to_keep=lambda samples, *_: list(range(len(samples))),
    )
    shaping = make_preparation(config).shaping
    return PpoEvaluation(
        config, experience, [TokenizedPrompt(0, "p", (5,))], shaping=shaping,
        gold=lambda _: list(map(ScoreResult.of, GOLD)), measures={},
        generate=lambda *_: trajectories, directory=tmp_path,
    )  # fmt: skip


def best_of(tmp_path: Path, *overrides: str) -> list[BestOf]:
    evaluation = make_evaluation(tmp_path, *overrides)
    evaluation.start = [HeldOutAnswer(0, "p", "r", finished=True, tokens=1, reward=0.0, gold=0.5)]
    return evaluation.measure_best_of()


def test_it_picks_by_the_reward(tmp_path: Path) -> None:
    pairs, four = best_of(tmp_path)
    assert (four.n, four.gold, four.win_rate) == (4, 0.0, 0.0)
    assert pairs.gold == pytest.approx((3 * 0.0 + 2 * 1.0 + 1 * 0.5) / 6) and pairs.win_rate == pytest.approx(2.5 / 6)


def test_an_answer_that_training_punishes_is_not_picked(tmp_path: Path) -> None:
    _, four = best_of(tmp_path, "algorithm.shaping.missing_eos={rule: replace, value: -1.0}")
    assert (four.gold, four.win_rate) == (1.0, 1.0)


def test_running_moments_are_those_of_the_samples(tmp_path: Path) -> None:
    shaping = ["algorithm.shaping.missing_eos={rule: replace, value: 0.0}", "algorithm.shaping.normalize=running"]
    _, four = best_of(tmp_path, *shaping)
    assert four.gold == 0.0, "0 is their mean, and the reward of the others is below it"


def test_a_run_of_version_0_1_finds_the_answers_of_its_start(tmp_path: Path) -> None:
    """It kept a count of habits beside each answer."""
    answer = HeldOutAnswer(0, "p", "r", finished=True, tokens=1, reward=0.0, gold=0.5)
    kept = {"answers": [{**asdict(answer), "habits": 2}], "best_of": []}
    (tmp_path / "start.json").write_text(json.dumps(kept))
    evaluation = make_evaluation(tmp_path)
    evaluation.measure_start(resumed=True)
    assert evaluation.start == [answer]
