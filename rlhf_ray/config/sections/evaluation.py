"""The ``evaluation`` section of each kind of training: when held-out rows are measured, and how."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.sections.base import NonNegative, Positive, Section
from rlhf_ray.config.sections.rewards import SHIPPED_FUNCTIONS


class EvaluationConfig(Section):
    """When held-out rows are measured."""

    every_steps: NonNegative = 0
    """0 evaluates only at the end."""


class PreferenceEvaluationConfig(EvaluationConfig):
    """When held-out preferences are measured."""

    worst_pairs: NonNegative = 20
    """How many wrongly ranked pairs the report shows, the worst first."""


class RewardEvaluationConfig(PreferenceEvaluationConfig):
    """When a reward model is measured on held-out pairs, and what is kept of it."""

    keep_best: bool = True
    """Whether ``best/`` keeps the weights of the evaluation with the highest accuracy."""


class PpoEvaluationConfig(EvaluationConfig):
    """How answers to held-out prompts are sampled and judged."""

    prompts: Positive = 300
    samples_per_prompt: Positive = 1
    greedy: bool = False
    """Whether each token is the likeliest one, instead of a sample at the training temperature."""
    gold: str | None = None
    """A function that knows the true quality of an answer, named like ``reward.function``; null: the gold score of the
    generated world, if the job reads that."""
    pass_at: list[Positive] = []  # noqa: RUF012 (pydantic copies it)
    """The values of k for pass@k: an answer is right if its gold score (or else its reward) is 1 or more."""
    best_of: NonNegative = 0
    """The largest n for which best-of-n sampling from the starting policy is measured; 0 measures none."""
    samples_shown: NonNegative = 3
    """How many prompts are shown with their answers in the log at each evaluation."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.greedy and self.samples_per_prompt > 1:
            yield (
                "samples_per_prompt",
                f"{self.samples_per_prompt} greedy answers to a prompt are all the same: set it to 1",
            )
        too_large = [k for k in self.pass_at if k > self.samples_per_prompt]
        if too_large:
            yield "pass_at", f"{too_large[0]} of {self.samples_per_prompt} samples: raise samples_per_prompt to it"
        if self.gold is not None and self.gold.count(":") != 1 and self.gold not in SHIPPED_FUNCTIONS:
            shipped = ", ".join(SHIPPED_FUNCTIONS)
            yield "gold", f"{self.gold!r} is not one of package.module:name, path.py:name, {shipped}"
