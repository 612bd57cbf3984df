"""The ``batch`` section of each kind of training: how much is sampled and trained on at a time, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.sections.base import Positive
from rlhf_ray.config.sections.roles import TokenBudget


class BatchConfig(TokenBudget):
    """Sizes of reinforcement learning, over all ranks."""

    prompts_per_step: Positive
    samples_per_prompt: Positive = 1
    sequences_per_update: Positive
    passes_per_step: Positive = 1

    @property
    def sequences_per_step(self) -> int:
        """Answers that a step samples and trains on."""
        return self.prompts_per_step * self.samples_per_prompt

    def conflicts(self) -> Iterator[tuple[str, str]]:
        step, update = self.sequences_per_step, self.sequences_per_update
        if step % update:
            divisors = [size for size in range(1, step + 1) if step % size == 0]
            nearest = min(divisors, key=lambda size: (abs(size - update), size))
            yield (
                "sequences_per_update",
                f"{update} does not divide the {step} sequences of a step (prompts_per_step {self.prompts_per_step} x "
                f"samples_per_prompt {self.samples_per_prompt}): the nearest size that does is {nearest}",
            )


class SequenceBatchConfig(TokenBudget):
    """Sizes of supervised fine-tuning: ``sequences_per_update`` counts over all ranks."""

    sequences_per_update: Positive


class PreferenceBatchConfig(TokenBudget):
    """Sizes of a policy's training on preferences, over all ranks: exactly one of the two is set."""

    pairs_per_update: Positive | None = None
    answers_per_update: Positive | None = None
    """Single answers with labels, for the loss ``kto``."""

    @property
    def per_update(self) -> int:
        """Pairs or answers of an update."""
        return self.pairs_per_update or self.answers_per_update or 1

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.pairs_per_update is None) == (self.answers_per_update is None):
            yield (
                "",
                "set exactly one of pairs_per_update (pairs) and answers_per_update (single answers, for loss.name=kto)",
            )


class PairBatchConfig(TokenBudget):
    """Sizes of preference training: ``pairs_per_update`` counts over all ranks."""

    pairs_per_update: Positive
