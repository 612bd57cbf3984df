"""One schedule a step, made right after the rollout, serves log-probs, values and the first pass.

Policy and critic see the same sequences in the same update, and which these are depends on seed and step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlhf_ray.actors.groups import SharedBatch
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.config.loading import parse_config
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.trainers.ppo.algorithm import make_preparation
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.roles import Groups
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule, Update

CONFIG = """
kind: ppo
run: {name: small}
steps: 3
policy: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
critic: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
reward: {function: gsm8k, hold_s: 0.0, on_failure: drop}
data: {world: {}}
batch: {prompts_per_step: 4, samples_per_prompt: 2, sequences_per_update: 4, passes_per_step: 2}
"""
PROMPTS = {number: TokenizedPrompt(number, f"p{number}", (number,)) for number in range(4)}


class Recorder:
    """A group that remembers what it was asked to run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.schedules: list[Schedule] = []
        self.updates: list[Update] = []

    def share(self, batch: TrajectoryBatch) -> SharedBatch:
        return SharedBatch(batch, None)

    def log_probs(self, shared: SharedBatch, schedule: Schedule) -> Pending[torch.Tensor]:
        self.schedules.append(schedule)
        return Pending.done(torch.zeros(shared.batch.num_tokens))

    values = log_probs

    def accumulate(self, shared: SharedBatch, update: Update, loss: Any, count: float) -> Pending[Report]:
        self.updates.append(update)
        return Pending.done(Report(finite=True, loss=0.0, metrics={}))

    def apply(self, skip: bool) -> Pending[Applied]:
        return Pending.done(Applied(skipped=skip, grad_norm=1.0, learning_rate=1e-3, update=1))


class Rewards:
    """A source without a reward for one prompt."""

    reads = "nothing"

    def __init__(self, failing: int | None) -> None:
        self.failing = failing

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        return Pending.done([
            ScoreResult.failed("it is NaN", fault="source") if sample.prompt_id == self.failing else ScoreResult.of(1.0)
            for sample in samples
        ])  # fmt: skip


class Text:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def make_groups(**overrides: int) -> tuple[Groups, dict[str, Any]]:
    """Groups of one, two and three ranks for policy, critic and reference."""
    config: Any = parse_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])
    recorders: dict[str, Any] = {
        role: Recorder(size) for role, size in (("policy", 1), ("critic", 2), ("reference", 3))
    }
    return Groups(config, **recorders), recorders


def make_trajectories() -> TrajectoryBatch:
    return TrajectoryBatch.from_sequences(
        [[prompt, *range(5, 6 + 2 * sample + prompt)] for prompt in PROMPTS for sample in range(2)],
        action_mask=[[False] + [True] * (1 + 2 * sample + prompt) for prompt in PROMPTS for sample in range(2)],
        prompt_id=[prompt for prompt in PROMPTS for _ in range(2)],
        sample_index=[0, 1] * 4,
        finish_reason=[0] * 8,
    )


def sequences(schedule: Schedule) -> list[tuple[int, ...]]:
    return [tuple(update.sequences) for update in schedule.updates]


@pytest.mark.parametrize("failing", [None, 2], ids=["all scored", "one prompt dropped"])
def test_the_schedule_of_the_forward_passes_is_that_of_the_first_pass(failing: int | None) -> None:
    groups, recorders = make_groups()
    preparation = make_preparation(groups.config)
    learner = Learner(groups.config, groups, preparation)
    experience = Experience(
        groups.config, groups=groups, preparation=preparation, rewards=Rewards(failing), tokenizer=Text()
    )
    batch, schedules, _ = experience.gather(make_trajectories(), PROMPTS, step=1)
    batch = batch.with_columns(rollout_log_probs=batch["log_probs"])
    batch, _ = experience.advantages(batch, 0.05, RunningMoments())
    learner.learn(batch, schedules, train_policy=True, kl_coefficient=0.05)
    assert len(batch) == 8 if failing is None else 6
    assert all(group.schedules[-1] is schedules[role] for role, group in recorders.items())
    for role in ("policy", "critic"):
        planned = schedules[role].updates
        first_pass = recorders[role].updates[: len(planned)]
        assert all(ran is update for ran, update in zip(first_pass, planned, strict=True))
    assert recorders["policy"].updates == 2 * list(schedules["policy"].updates), "two passes"


def test_policy_and_critic_see_the_same_sequences_in_the_same_update() -> None:
    groups, _ = make_groups()
    schedules = groups.schedules(make_trajectories(), step=1)
    assert sequences(schedules["policy"]) == sequences(schedules["critic"]) and len(schedules["policy"].updates) == 2
    assert len(schedules["reference"].updates) == 1, "the reference learns nothing"


def test_the_sequences_of_an_update_depend_on_seed_and_step_alone() -> None:
    trajectories = make_trajectories()
    one, other = (make_groups()[0].schedules(trajectories, step=1)["policy"] for _ in range(2))
    assert sequences(one) == sequences(other)
    next_step = make_groups()[0].schedules(trajectories, step=2)["policy"]
    other_seed = make_groups(**{"run.seed": 7})[0].schedules(trajectories, step=1)["policy"]
    assert sequences(one) != sequences(next_step) and sequences(one) != sequences(other_seed)
