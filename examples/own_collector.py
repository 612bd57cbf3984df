"""A collector of your own: sample more prompts than a step needs, and learn from those with the longest answers.

    rlhf-ray train ppo demo-ppo algorithm.collector=examples/own_collector.py:Longest algorithm.parameters.collector.times=2

A collector decides which prompts are sampled and which samples a step learns from. Every prompt that it takes counts as used,
also when its samples are left out. It must keep nothing between steps: a resumed run makes it anew.
"""

from __future__ import annotations

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.trainers.ppo.sampling import Collected, Phase, RecordedPrompts, Sampler


class Longest:
    """Takes ``times`` as many prompts as ``batch.prompts_per_step``, and keeps those whose longest answer is longest."""

    def __init__(self, config: PpoConfig, prompts: RecordedPrompts, sampler: Sampler, times: int = 2) -> None:
        """``config``, ``prompts`` and ``sampler`` come from the run (``experience`` could too); ``times`` from the config."""
        self.wanted = config.batch.prompts_per_step
        self.prompts = prompts
        self.sampler = sampler
        self.times = times

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """One step's samples; ``phase`` times what is done within it, for the metrics."""
        taken = self.prompts.take(self.times * self.wanted)
        with phase("rollout"):
            trajectories = self.sampler.generate(taken, step)
        longest: dict[int, int] = {}
        for prompt, length in zip(trajectories["prompt_id"].tolist(), trajectories.lengths.tolist(), strict=True):
            longest[prompt] = max(length, longest.get(prompt, 0))
        kept = sorted(longest, key=lambda prompt: -longest[prompt])[: self.wanted]
        rows = [row for row, prompt in enumerate(trajectories["prompt_id"].tolist()) if prompt in kept]
        return Collected(taken, trajectories.select(rows))
