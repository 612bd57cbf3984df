"""From prompts to trajectories: requests with fixed names and seeds, answered by the fleet.

Always true: no two requests of a call have the same name, also where an epoch ends inside a step and a prompt comes twice;
seeds are given in deterministic mode only, since they cost the engines their fast sampler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_ray.config.schema import PpoConfig
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.trainers.experience import TokenizedPrompt
from rlhf_ray.trajectories.batch import TrajectoryBatch

HELD_OUT = -1
"""The ``step`` in the seeds of held-out samples: no training step has it."""


class Sampler:
    """The rollout engines of a run."""

    def __init__(self, config: PpoConfig, fleet: Fleet) -> None:
        self.config = config
        self.fleet = fleet

    def generate(self, prompts: Sequence[TokenizedPrompt], step: int) -> TrajectoryBatch:
        """``samples_per_prompt`` answers to each prompt."""
        return self._generate(prompts, self.config.batch.samples_per_prompt, step)

    def held_out(self, prompts: Sequence[TokenizedPrompt], samples: int, greedy: bool) -> TrajectoryBatch:
        """``samples`` answers to each held-out prompt, or the greedy one."""
        return self._generate(prompts, samples, HELD_OUT, greedy=greedy)

    def update_weights(self, version: int, weights: Any) -> None:
        self.fleet.update_weights(version, weights)

    def _generate(
        self, prompts: Sequence[TokenizedPrompt], samples: int, step: int, *, greedy: bool = False
    ) -> TrajectoryBatch:
        times = Counter(prompt.prompt_id for prompt in prompts)
        unique = {prompt.prompt_id: prompt for prompt in prompts}
        requests = [
            request
            for prompt_id, prompt in unique.items()
            for request in make_requests(
                [(prompt_id, prompt.token_ids)],
                samples_per_prompt=samples * times[prompt_id],
                max_new_tokens=self.config.rollout.max_new_tokens,
                run_seed=self.config.run.seed if self.config.run.deterministic else None,
                step=step,
                greedy=greedy,
            )
        ]
        return self.fleet.generate(requests, self.config.rollout.timeout_s)
