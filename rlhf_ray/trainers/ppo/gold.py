"""What is known of answers beside their reward, where it is known: the truth, and a planted habit that is worth nothing.

Always true: both are for the report; a policy is trained on the truth only where it is the reward too, and on the habit never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rlhf_ray.config.schema import PpoConfig, RewardConfig
from rlhf_ray.errors import ScoringError
from rlhf_ray.trainers.ppo.experience import TextSample
from rlhf_ray.trainers.ppo.rewards import function_source
from rlhf_ray.world.language import habits_in

Gold = Callable[[Sequence[TextSample]], list[float]]
Habits = Callable[[str], int]


def gold_of(config: PpoConfig, cleanup: ExitStack) -> Gold | None:
    """What scores samples by the truth: ``evaluation.gold``, or the generated world's own; none where neither is there."""
    name = config.evaluation.gold or world_gold(config)
    return None if name is None else gold_function(name, cleanup)


def gold_function(name: str, cleanup: ExitStack) -> Gold:
    """The function ``name`` as a gold score; what it fails at is an error."""
    source = function_source(name, RewardConfig(function=name), cleanup)

    def gold(samples: Sequence[TextSample]) -> list[float]:
        results = source.score(samples).result()
        failed = next((result.error for result in results if result.error is not None), None)
        if failed is not None:
            raise ScoringError(f"no gold score (evaluation.gold): {failed}")
        return [float(result.reward) for result in results if result.reward is not None]

    return gold


def world_gold(config: PpoConfig) -> str | None:
    """The function that knows the truth of the generated world's prompts; none where prompts are from elsewhere."""
    if config.data.world is None:
        return None
    return {"customers": "world.gold", "arithmetic": "world.arithmetic"}[config.data.world.task]


def habits_of(config: PpoConfig) -> Habits | None:
    """What counts the planted habit in an answer; none where prompts are not the letters of the generated world."""
    return habits_in if config.data.world is not None and config.data.world.task == "customers" else None
