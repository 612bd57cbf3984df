"""Where a PPO run stands: all that the driver must remember between two steps.

Always true: ``PpoProgress.from_state(progress.state())`` is the same progress; ``weight_version`` counts publications and
is published again under the same number after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.algorithms.kl import AdaptiveKl, FixedKl, kl_controller
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.config.sections.algorithm import KlConfig
from rlhf_ray.trainers.ppo.update import StepOutcome
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass
class PpoProgress:
    """Counters, the KL controller, and the moments of all rewards so far."""

    kl: FixedKl | AdaptiveKl
    moments: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0
    update: int = 0
    weight_version: int = 0
    consecutive_skips: int = 0

    @classmethod
    def start(cls, config: KlConfig) -> PpoProgress:
        """Before the first step."""
        return cls(kl_controller(config.coefficient, config.target, config.horizon))

    def observe_scores(self, batch: TrajectoryBatch) -> None:
        """Take up the scores of a step, before anything is made of them."""
        self.moments = self.moments.update(batch["score"])

    def finish_step(self, outcome: StepOutcome, objective: Mapping[str, float], *, sequences: int) -> None:
        """Count a step over ``sequences`` samples; its mean sequence KL is in ``objective`` where there is a reference."""
        self.step += 1
        self.update += outcome.updates - outcome.skipped
        skipped_all = outcome.skipped == outcome.updates
        self.consecutive_skips = self.consecutive_skips + outcome.skipped if skipped_all else outcome.last_skips
        self.kl = self.kl.update(objective.get("kl/k1", math.nan), sequences)

    def metrics(self) -> dict[str, float]:
        """The counters as metrics."""
        return {
            "update": float(self.update),
            "weights/version": float(self.weight_version),
            "kl/coefficient": self.kl.coefficient,
        }

    def state(self) -> dict[str, Any]:
        counters = ("step", "update", "weight_version", "consecutive_skips")
        state = {"kl": self.kl.state(), "moments": self.moments.state()}
        return {**state, **{name: getattr(self, name) for name in counters}}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what ``state`` was taken of."""
        self.kl = self.kl.restored(state["kl"])
        self.moments = RunningMoments.restored(state["moments"])
        self.step, self.update = state["step"], state["update"]
        self.weight_version, self.consecutive_skips = state["weight_version"], state["consecutive_skips"]
