"""A run whose environment takes several turns: its reward is the sum over the turns, and a failure drops the prompt."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.errors import ScoringError
from rlhf_ray.trajectories.batch import TrajectoryBatch

from .small_runs import config_of, train

ENVIRONMENT = '''
from rlhf_ray.environments import Turn

class Letters:
    """Rewards the letters of each answer; a task whose number is in ``broken`` fails in its second turn."""
    def __init__(self, broken=()):
        self.broken = broken
    def reset(self, task):
        self.prompt, self.turns = task.prompt, 0
    def step(self, answer):
        self.turns += 1
        if self.turns == 2 and any(text in self.prompt for text in self.broken):
            raise ValueError("broken")
        return Turn(float(len(answer.text)), done=self.turns == 2, observation="." * self.turns)
'''


def config(tmp_path, *overrides, broken="[]"):
    (tmp_path / "letters.py").write_text(ENVIRONMENT)
    name = f"{tmp_path}/letters.py:Letters"
    return config_of(
        "ppo",
        tmp_path,
        f"rollout.environment={{name: '{name}', parameters: {{broken: {broken}}}, max_turns: 3}}",
        "rollout.max_model_tokens=128",
        *overrides,
    )


@pytest.mark.parametrize("mode", ["sync", pytest.param("one_step_off", marks=pytest.mark.long)])
def test_a_run_learns_from_the_rewards_of_all_turns(tmp_path, mode, project_log):
    overrides = ["reward={function: environment, hold_s: 0.0}", f"rollout.mode={mode}"]
    if mode == "one_step_off":
        overrides.append("algorithm.max_staleness=1")
    run = train(config(tmp_path, *overrides))
    rows = [
        json.loads(line) for path in sorted((run.path / "samples").glob("*")) for line in path.read_text().splitlines()
    ]
    assert rows
    for row in rows:
        assert row["response"].count(".") >= 1, "what the environment said is part of the episode"
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    turns = [row["length/turns"] for row in metrics if "length/turns" in row]
    assert turns == [2.0] * len(turns) and turns
    assert "answers were cut" not in project_log.getvalue(), "an episode is no answer, and has ends of turns in it"


def test_an_environment_that_fails_everywhere_stops_the_run_and_says_what_it_did(tmp_path):
    with pytest.raises(ScoringError, match="the environment raised an error"):
        train(config(tmp_path, "reward={function: environment, hold_s: 0.0}", broken="['']"))


def test_rewards_of_turns_stand_at_the_ends_of_turns_and_add_up_to_the_shaped_score():
    seen = {}

    class Estimator:
        needs = ()

        def __call__(self, batch, token_rewards):
            seen["rewards"] = token_rewards
            return torch.zeros_like(token_rewards), None

    class Doubled:
        def __call__(self, score, *rest):
            return 2 * score

    class NoCorrection:
        def __call__(self, log_probs, rollout, mask, offsets):
            return torch.ones_like(log_probs), {}

    batch = TrajectoryBatch.from_sequences(
        [[1, 2, 3, 4, 5]],
        action_mask=[[False, True, False, True, True]],
        turn_rewards=[[0.0, 0.25, 0.0, 0.0, 1.0]],
        log_probs=[[0.0] * 5],
        rollout_log_probs=[[0.0] * 5],
        score=[1.25],
        finish_reason=[0],
    )
    prepare = Preparation(Doubled(), Estimator(), NoCorrection())
    prepare(batch, kl_coefficient=0.0, moments=RunningMoments())
    assert seen["rewards"].tolist() == [0.0, 0.25, 0.0, 0.0, 2.25]
