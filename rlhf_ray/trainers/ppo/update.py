"""From a batch with advantages to new weights: denominators, accumulate, vote, apply.

Always true: policy and critic see the same sequences in the same update; the denominator of an update counts all its
sequences over all ranks and micro-batches; if any rank of either saw NaN or Inf, both leave their weights as they were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_ray.actors.groups import SharedBatch
from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import ValueLoss
from rlhf_ray.algorithms.policy_loss import PolicyLoss
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.trainers.ppo.algorithm import make_policy_loss, make_value_loss
from rlhf_ray.trainers.ppo.roles import Groups, Schedules
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Update


@dataclass
class StepOutcome:
    """What the updates of one step came to."""

    updates: int = 0
    skipped: int = 0
    policy_applied: bool = False
    last_skips: int = 0
    """Skipped updates since the last applied one."""
    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    latest: dict[str, float] = field(default_factory=dict)

    def add(self, reports: Mapping[str, Report], applied: Mapping[str, Applied]) -> None:
        """Count one update."""
        self.updates += 1
        if any(one.skipped for one in applied.values()):
            self.skipped += 1
            self.last_skips += 1
            return
        self.last_skips = 0
        self.policy_applied |= "policy" in applied
        for report in reports.values():
            for name, (total, count) in report.metrics.items():
                self.sums[name][0] += total
                self.sums[name][1] += count
        for role, one in applied.items():
            assert one.grad_norm is not None
            self.latest[f"grad_norm/{role}"] = one.grad_norm
            self.latest[f"learning_rate/{role}"] = one.learning_rate

    @property
    def metrics(self) -> dict[str, float]:
        """Means over all tokens of all applied updates."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return {**means, **self.latest, "updates/skipped": float(self.skipped)}


class Learner:
    """The training half of a PPO step."""

    def __init__(self, config: PpoConfig, groups: Groups, preparation: Preparation) -> None:
        self.config = config
        self.groups = groups
        self.preparation = preparation
        self.policy_loss = make_policy_loss(config)
        self.value_loss = make_value_loss(config)

    def learn(
        self, batch: TrajectoryBatch, schedules: Schedules, *, train_policy: bool, kl_coefficient: float
    ) -> StepOutcome:
        """All updates of all passes over one step's batch."""
        shared = self.groups.policy.share(self.preparation.trained(batch))
        losses: dict[str, PolicyLoss | ValueLoss] = {
            "policy": self.policy_loss.with_kl_coefficient(kl_coefficient),
            "critic": self.value_loss,
        }
        roles = [role for role in self.groups.trained if role != "policy" or train_policy]
        outcome = StepOutcome()
        for _ in range(self.config.batch.passes_per_step):
            for updates in zip(*(schedules[role].updates for role in roles), strict=True):
                jobs = {role: (update, losses[role]) for role, update in zip(roles, updates, strict=True)}
                self._update(shared, jobs, outcome)
        return outcome

    def _update(
        self, shared: SharedBatch, jobs: Mapping[str, tuple[Update, PolicyLoss | ValueLoss]], outcome: StepOutcome
    ) -> None:
        """Accumulate on all roles, let all ranks vote, apply on all or on none."""
        pending = {
            role: self.groups.trained[role].accumulate(
                shared, update, loss, denominator(loss.denominator, shared.batch, update.sequences)
            )
            for role, (update, loss) in jobs.items()
        }
        reports = {role: one.result() for role, one in pending.items()}
        skip = not all(report.finite for report in reports.values())
        steps = {role: self.groups.trained[role].apply(skip) for role in reports}
        outcome.add(reports, {role: one.result() for role, one in steps.items()})
