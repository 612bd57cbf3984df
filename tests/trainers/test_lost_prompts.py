"""Dynamic sampling replaces prompts that killed engines, as it does those whose answers all score the same."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.rollout.requests import Generation, gather, make_requests
from rlhf_ray.trainers.ppo import sampling
from rlhf_ray.trainers.ppo.experience import ScoredSamples
from rlhf_ray.trainers.ppo.sampling import Collected, DynamicSampling, FixedSampling
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason
from tests.trainers.small_runs import config_of


class Stream:
    """Prompts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> list[TokenizedPrompt]:
        self.next += count
        return [TokenizedPrompt(number, "", (1, 2)) for number in range(self.next - count, self.next)]


@pytest.mark.parametrize(("killers", "kept"), [({0, 1}, [2, 3]), ({0}, [1, 2]), (set(range(99)), [])])
def test_prompts_without_answers_are_replaced(
    killers: set[int], kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(prompts: list[TokenizedPrompt], step: int) -> TrajectoryBatch:
        left = [(one.prompt_id, one.token_ids) for one in prompts if one.prompt_id not in killers]
        requests = make_requests(left, samples_per_prompt=2, max_new_tokens=1)
        return gather(requests, [Generation(*one.key, (5,), (-0.1,), (0,), FinishReason.STOP) for one in requests])

    def informative(part: Collected) -> Collected:
        answered = set(part.trajectories["prompt_id"].tolist())
        return Collected([one for one in part.prompts if one.prompt_id in answered], part.trajectories, part.scored)

    def score(batch: TrajectoryBatch, prompts: Any) -> ScoredSamples:
        assert len(batch), "nothing is scored where there is nothing"
        return ScoredSamples([None] * len(batch), [None] * len(batch))  # type: ignore[list-item]

    monkeypatch.setattr(sampling, "keep_informative", informative)
    config = config_of("ppo", tmp_path, "algorithm.dynamic_sampling=2")
    assert config.batch.prompts_per_step == 2
    fixed = FixedSampling(config, Stream(), SimpleNamespace(generate=generate))  # type: ignore[arg-type]
    experience: Any = SimpleNamespace(score_trajectories=score)
    collected = DynamicSampling(fixed, experience).collect(0, 0, lambda name: nullcontext())
    assert collected.trajectories["prompt_id"].tolist() == [number for number in kept for _ in range(2)]
    assert [one.prompt_id for one in collected.prompts] == list(range({2: 4, 1: 3}.get(len(killers), 6)))
