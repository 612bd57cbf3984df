"""The state of a PPO run's driver between two steps.

Invariants: ``restore(progress.state())`` gives the same progress, and the state is plain JSON. ``weight_version`` counts how
often weights were sent to the rollout engines; a resumed run sends its weights again under the number that they had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.algorithms.kl import AdaptiveKl, FixedKl, kl_controller
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.algorithm import KlConfig
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.trainers.guards import Guards
from rlhf_ray.trainers.ppo.update import StepOutcome
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass
class PpoProgress:
    """Counters, the KL controller, and mean and variance of all rewards so far."""

    kl: FixedKl | AdaptiveKl
    updates_per_step: int
    """Updates that a step is to have from here on; one whose prompts were left out has fewer."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0
    update: int = 0
    planned_updates: int = 0
    """Updates that the steps so far were to have, for the learning rate: a resumed run may change the size of its steps."""
    weight_version: int = 0
    consecutive_skips: int = 0
    guards: Guards = field(default_factory=lambda: Guards(GuardsConfig()))
    """What is remembered of the updates so far, to see which stand out."""

    @classmethod
    def start(cls, config: KlConfig, updates_per_step: int = 1, guards: GuardsConfig | None = None) -> PpoProgress:
        """The progress of a run before its first step."""
        kl = kl_controller(config.coefficient, config.target, config.horizon)
        return cls(kl, updates_per_step, guards=Guards(guards or GuardsConfig()))

    def observe_scores(self, batch: TrajectoryBatch) -> None:
        """Add the scores of a step, as the reward source gave them, to the moments."""
        self.moments = self.moments.update(batch["score"])

    def finish_step(self, outcome: StepOutcome, objective: Mapping[str, float], *, sequences: int) -> None:
        """Count a step of ``sequences`` samples, and adapt the KL coefficient to ``objective["kl/k1"]`` if it is there."""
        self.step += 1
        self.planned_updates += self.updates_per_step
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
        """The progress as plain JSON, for a checkpoint."""
        counters = ("step", "update", "planned_updates", "weight_version", "consecutive_skips")
        state = {"kl": self.kl.state(), "moments": self.moments.state(), "guards": self.guards.state()}
        return {**state, **{name: getattr(self, name) for name in counters}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`state` returned."""
        self.kl = self.kl.restored(state["kl"])
        self.moments = RunningMoments.restored(state["moments"])
        self.step, self.update = state["step"], state["update"]
        self.planned_updates = planned_updates(state, self.updates_per_step)
        self.weight_version, self.consecutive_skips = state["weight_version"], state["consecutive_skips"]
        self.guards.restore(state.get("guards"))


def planned_updates(state: Mapping[str, Any], updates_per_step: int) -> int:
    """The updates that the steps behind ``state`` were to have; without a count of them all steps were of one size."""
    return int(state.get("planned_updates", int(state["step"]) * updates_per_step))


def updates_in_all(config: PpoConfig, state: Mapping[str, Any] | None) -> int:
    """Optimizer updates of the whole run: those of the steps behind ``state``, and those of the steps to come.

    ``state`` is the progress in the checkpoint that the run goes on from, or none at its start.
    """
    if state is None:
        return config.steps * config.updates_per_step
    to_come = config.steps - int(state["step"])
    return planned_updates(state, config.updates_per_step) + to_come * config.updates_per_step
