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
from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.trainers.ppo.rewards import make_function_source
from rlhf_ray.world.gold import GOLD_FUNCTIONS, answer_measures

Gold = Callable[[Sequence[TextSample]], list[float]]
"""Scores samples by the truth, in order."""
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
    of_steps = None if world is None else make_gold(GOLD_FUNCTIONS[world.task], cleanup)
    named = config.evaluation.gold
    return GroundTruth(
        of_steps=of_steps,
        of_evaluations=of_steps if named is None else make_gold(named, cleanup),
        measures={} if world is None else answer_measures(world.task),
    )


def make_gold(name: str, cleanup: ExitStack) -> Gold:
    """The reward function called ``name`` as a gold score, which raises :class:`ScoringError` where the function fails."""
    source = make_function_source(name, RewardConfig(function=name), cleanup)

    def score(samples: Sequence[TextSample]) -> list[float]:
        results = source.score(samples).result()
        error = next((result.error for result in results if result.error is not None), None)
        if error is not None:
            raise ScoringError(f"no gold score (evaluation.gold): {error}")
        return [float(result.reward) for result in results if result.reward is not None]

    return score
