"""The ground truth about answers, and measures of their text, where a job's prompts come with them.

Always true: both are for the report; a policy is trained on the truth only where it is the reward too, and on a measure never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rlhf_ray.config.schema import PpoConfig, RewardConfig
from rlhf_ray.errors import ScoringError
from rlhf_ray.trainers.ppo.experience import TextSample
from rlhf_ray.trainers.ppo.rewards import function_source
from rlhf_ray.world.gold import GOLD_FUNCTIONS, AnswerMeasures, answer_measures

Gold = Callable[[Sequence[TextSample]], list[float]]


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
    return None if config.data.world is None else GOLD_FUNCTIONS[config.data.world.task]


def measures_of(config: PpoConfig) -> AnswerMeasures:
    """What the generated world measures in the text of an answer; nothing where prompts are from elsewhere."""
    return {} if config.data.world is None else answer_measures(config.data.world.task)
