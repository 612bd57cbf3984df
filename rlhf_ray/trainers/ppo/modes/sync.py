"""The mode ``sync``: a step begins to sample once the step before it is published.

Invariant: nothing is under way on the engines, and no prompt is taken that is not used, outside of :meth:`Sync.collect`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.trainers.ppo.sampling import Collected, Collector, Phase, PromptStream


@dataclass
class Sync:
    """Collects the samples of a step when the step asks for them."""

    collector: Collector
    prompts: PromptStream
    trains_on_newest: bool = True

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """The samples of ``step``, by the weights that are published."""
        return self.collector.collect(step, version, phase)

    def pause(self) -> None:
        """Nothing is under way."""

    def settle(self) -> None:
        """Nothing is under way."""

    def before_checkpoint(self) -> None:
        """Nothing is under way."""

    def position(self, step: int) -> dict[str, Any]:
        """The prompts of the finished steps, and no others, are taken."""
        return self.prompts.state()

    def save(self, directory: Path, step: int) -> None:
        """There are no samples of steps to come."""

    def restore(self, directory: Path) -> None:
        """Nothing was saved by this mode; what another mode saved is sampled again, since its prompts do not count as taken."""

    def go_back(self, position: dict[str, Any], directory: Path | None) -> None:
        """Take prompts from ``position`` on."""
        self.prompts.restore(position)

    def close(self) -> None:
        """Nothing is under way."""
