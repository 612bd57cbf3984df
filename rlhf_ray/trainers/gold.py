"""The truth of the generated world, where a run is over it: for the report and, on request, as the reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf_ray.config.schema import PpoConfig
from rlhf_ray.data.world import arithmetic_score, gold_score
from rlhf_ray.trainers.experience import TextSample


def gold_of(config: PpoConfig) -> Callable[[TextSample], float] | None:
    """The gold score of a sample in the generated world; none where the truth is not known."""
    if config.data.world is None:
        return None
    return lambda sample: gold_score(sample.prompt, sample.response, sample.finished)


def world_function(config: PpoConfig) -> Callable[..., Sequence[float]] | None:
    """The world's own reward functions, ``world.gold`` and ``world.arithmetic``; none for any other name."""
    return {"world.gold": _gold, "world.arithmetic": _arithmetic}.get(config.reward.function or "")


def _gold(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str | None], finished: Sequence[bool]
) -> list[float]:
    return [gold_score(*sample) for sample in zip(prompts, responses, finished, strict=True)]


def _arithmetic(
    prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str | None], finished: Sequence[bool]
) -> list[float]:
    return [arithmetic_score(str(label), *rest) for label, *rest in zip(labels, responses, finished, strict=True)]
