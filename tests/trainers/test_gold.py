"""The truth about answers is asked of the generated world in one place, and made once a run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rlhf_ray.config.loading import load_config, parse_config
from rlhf_ray.data.ends import EndTokens
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.trainers.ppo.gold import GroundTruth, make_gold, make_ground_truth
from rlhf_ray.trainers.ppo.metrics import StepMetrics

ROWS = """
kind: ppo
run: {name: small}
steps: 3
policy: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
critic: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
reward: {function: gsm8k}
data: {path: rows.jsonl}
batch: {prompts_per_step: 4, samples_per_prompt: 2, sequences_per_update: 8}
"""


def sample(response: str, label: str | None) -> TextSample:
    return TextSample(0, 0, "12 + 3 =", response, label, finished=True, token_ids=(1, 2))


def make_truth(config: Any) -> GroundTruth:
    with ExitStack() as cleanup:
        return make_ground_truth(config, cleanup)


def test_steps_and_evaluations_of_the_generated_world_share_one_gold_function() -> None:
    truth = make_truth(load_config("demo-ppo"))
    assert truth.of_steps is not None and truth.of_steps is truth.of_evaluations
    assert set(truth.measures) == {"habit_rate", "habits_per_answer"}


def test_another_gold_function_is_for_evaluations_alone() -> None:
    truth = make_truth(load_config("demo-ppo", ["evaluation.gold=exact_match"]))
    assert truth.of_steps is not None and truth.of_evaluations is not None
    assert truth.of_evaluations is not truth.of_steps
    scores = truth.of_evaluations([sample("15", "15"), sample("16", "15")])
    assert [score.reward for score in scores] == [1.0, 0.0]


def test_nothing_is_known_of_answers_to_prompts_from_elsewhere() -> None:
    truth = make_truth(parse_config(ROWS))
    assert truth == GroundTruth()
    assert StepMetrics(parse_config(ROWS), None, EndTokens({}, {}), truth.of_steps).gold is None  # type: ignore[arg-type]


def test_a_gold_function_that_fails_says_so_of_its_sample() -> None:
    with ExitStack() as cleanup:
        (score,) = make_gold("gsm8k", 0.0, cleanup)([sample("15", None)])
    assert score.reward is None and str(score.error).startswith("reward function gsm8k raised")
