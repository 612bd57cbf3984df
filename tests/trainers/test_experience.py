"""A sample without a reward is never trained on: its prompt goes with all its samples, or the run stops, as configured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlhf_ray.config.loading import parse_config
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.mixture import MixedResult
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.trainers.ppo.algorithm import make_preparation
from rlhf_ray.trainers.ppo.experience import Experience, score_columns
from rlhf_ray.trainers.ppo.roles import Groups
from rlhf_ray.trajectories.batch import TrajectoryBatch

CONFIG = """
kind: ppo
run: {name: small}
steps: 3
policy: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
critic: {model: {path: org/name}, engine: {optimizer: {learning_rate: 1e-3}}}
reward: {function: gsm8k, hold_s: 0.0}
data: {world: {}}
batch: {prompts_per_step: 4, samples_per_prompt: 2, sequences_per_update: 8}
"""


class Bad:
    """A source that has no reward for the samples (prompt, sample) in ``bad``."""

    reads = "nothing"

    def __init__(self, *bad: tuple[int, int]) -> None:
        self.bad = bad

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        return Pending.done([
            ScoreResult.failed("it is NaN", fault="source")
            if (sample.prompt_id, sample.sample_index) in self.bad
            else ScoreResult.of(10.0 * sample.prompt_id + sample.sample_index)
            for sample in samples
        ])  # fmt: skip


class Columns:
    """A group of one rank that answers a column of zeros."""

    size = 1

    def share(self, batch: TrajectoryBatch) -> TrajectoryBatch:
        return batch

    def log_probs(self, batch: TrajectoryBatch, schedule: Any) -> Pending[torch.Tensor]:
        return Pending.done(torch.zeros(batch.num_tokens))

    values = log_probs


class Text:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


PROMPTS = {number: TokenizedPrompt(number, f"p{number}", (number,), source=f"s{number % 2}") for number in range(4)}


def gather(source: Bad, *overrides: str, **options: Any) -> TrajectoryBatch:
    config: Any = parse_config(CONFIG, overrides)
    groups: Any = Columns()
    roles, preparation = Groups(config, groups, groups, groups), make_preparation(config)
    experience = Experience(config, groups=roles, preparation=preparation, rewards=source, tokenizer=Text())
    sequences = [[prompt, 5, 6] for prompt in PROMPTS for _ in range(2)]
    batch = TrajectoryBatch.from_sequences(
        sequences,
        action_mask=[[False, True, True]] * 8,
        prompt_id=[prompt for prompt in PROMPTS for _ in range(2)],
        sample_index=[0, 1] * 4,
        finish_reason=[0] * 8,
    )
    return experience.gather(batch, PROMPTS, step=0, **options)[0]


def test_a_prompt_is_dropped_with_all_its_samples() -> None:
    batch = gather(Bad((1, 0)), "reward.on_failure=drop")
    assert batch["prompt_id"].tolist() == [0, 0, 2, 2, 3, 3]
    assert batch["score"].tolist() == [0.0, 1.0, 20.0, 21.0, 30.0, 31.0]


def test_or_the_run_stops_and_says_which_sample_and_why() -> None:
    with pytest.raises(ScoringError, match=r"no reward for 1 of 8 samples after 0 s, such as sample 1 of prompt 2: it is NaN; "
                                           r"mend the reward source, or set reward.on_failure to drop"):  # fmt: skip
        gather(Bad((2, 1)))


def test_more_than_the_allowed_share_stops_the_run_too() -> None:
    bad = Bad((0, 0), (1, 1), (1, 0))
    assert gather(bad, "reward.on_failure=drop")["prompt_id"].tolist() == [2, 2, 3, 3]
    with pytest.raises(ScoringError, match=r"2 of 4 prompts would be dropped, more than reward.max_dropped_share 0.4"):
        gather(bad, "reward.on_failure=drop", "reward.max_dropped_share=0.4")


def test_the_terms_of_a_mixture_become_columns() -> None:
    results = [MixedResult(raw=x, reward=x, terms={"a": x, "b": -x}) for x in (1.0, 2.0)]
    assert score_columns(results) == {"score": [1.0, 2.0], "term_a": [1.0, 2.0], "term_b": [-1.0, -2.0]}
    assert score_columns([ScoreResult.of(3.0)]) == {"score": [3.0]}
