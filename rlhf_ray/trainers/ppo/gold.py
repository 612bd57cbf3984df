"""The ground truth about answers, where it is known, and what else is measured of their text.

Invariants: everything here is reported and never trained on, unless the config names the same function as the reward. Only
this module of PPO training asks the generated world about answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.rewards import RewardConfig
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import score_or_hold
from rlhf_ray.trainers.ppo.rewards import make_function_source
from rlhf_ray.world.gold import GOLD_FUNCTIONS, answer_measures

Gold = Callable[[Sequence[TextSample]], list[ScoreResult]]
"""Scores samples by the truth, in order, or says why one has no such score."""
Measures = Mapping[str, Callable[[str], float]]
"""What an evaluation reports about the text of each answer, by the name of its metric."""


@dataclass(frozen=True)
class GroundTruth:
    """What is known about the answers of a run beside their reward."""

    of_steps: Gold | None = None
    """Scores the samples of every step: the generated world's own truth, which costs nothing."""
    of_evaluations: Gold | None = None
    """Scores the answers to held-out prompts: ``evaluation.gold``, or else the generated world's truth."""
    measures: Measures = field(default_factory=dict)


def make_ground_truth(config: PpoConfig, cleanup: ExitStack) -> GroundTruth:
    """What a job knows about answers; ``cleanup`` ends the processes that this starts."""
    world = config.data.world
    hold_s = config.reward.hold_s
    of_steps = None if world is None else make_gold(GOLD_FUNCTIONS[world.task], hold_s, cleanup)
    named = config.evaluation.gold
    return GroundTruth(
        of_steps=of_steps,
        of_evaluations=of_steps if named is None else make_gold(named, hold_s, cleanup),
        measures={} if world is None else answer_measures(world.task),
    )


def make_gold(name: str, hold_s: float, cleanup: ExitStack) -> Gold:
    """The reward function called ``name`` as a gold score; what it fails at is tried again for ``hold_s`` seconds."""
    source = make_function_source(name, RewardConfig(function=name), cleanup)
    return lambda samples: score_or_hold(source, samples, hold_s=hold_s)
