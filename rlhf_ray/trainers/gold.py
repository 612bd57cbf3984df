"""The truth that answers are judged by, where it is known: for the report, and trained on only where it is the reward too."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_ray.config.schema import PpoConfig
from rlhf_ray.data.world import gold_score
from rlhf_ray.trainers.experience import TextSample


def gold_of(config: PpoConfig) -> Callable[[TextSample], float] | None:
    """The gold score of a sample in the generated world; none where the truth is not known."""
    if config.data.world is None:
        return None
    return lambda sample: gold_score(sample.prompt, sample.response, sample.finished)
