"""Update the weights from a batch with advantages: accumulate gradients, let all ranks vote, then apply or skip.

Invariants: policy and critic see the same sequences in the same update. The denominator of an update counts all its
sequences over all ranks and micro-batches. If any rank of either role saw NaN or Inf, both keep their weights.
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
from rlhf_ray.models.devices import GpuPeak
from rlhf_ray.trainers.ppo.algorithm import make_policy_loss, make_value_loss
from rlhf_ray.trainers.ppo.roles import Groups, Schedules
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Update


@dataclass
class StepOutcome:
    """Counts and metrics of the updates of one step."""

    updates: int = 0
    skipped: int = 0
    policy_applied: bool = False
    last_skips: int = 0
    """How many updates were skipped after the last one that was applied."""
    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    latest: dict[str, float] = field(default_factory=dict)

    def add(self, reports: Mapping[str, Report], applied: Mapping[str, Applied]) -> None:
        """Count one update, by the reports and results of the roles that took part."""
        self.updates += 1
        for role, result in applied.items():
            self._measure(role, result.gpu)
        if any(result.skipped for result in applied.values()):
            self.skipped += 1
            self.last_skips += 1
            return
        self.last_skips = 0
        self.policy_applied |= "policy" in applied
        for report in reports.values():
            for name, (total, count) in report.metrics.items():
                self.sums[name][0] += total
                self.sums[name][1] += count
        for role, result in applied.items():
            assert result.grad_norm is not None, "an update that was applied has a gradient norm"
            self.latest[f"grad_norm/{role}"] = result.grad_norm
            self.latest[f"learning_rate/{role}"] = result.learning_rate

    def _measure(self, role: str, gpu: GpuPeak | None) -> None:
        """Keep the largest peaks of the step."""
        peaks = () if gpu is None else (("allocated", gpu.allocated_gb), ("reserved", gpu.reserved_gb))
        for kind, peak in peaks:
            name = f"memory/gpu_{kind}_gb/{role}"
            self.latest[name] = max(peak, self.latest.get(name, 0.0))

    @property
    def metrics(self) -> dict[str, float]:
        """Means over everything that was counted in all applied updates; the latest learning rates and norms; the peaks."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return {**means, **self.latest, "updates/skipped": float(self.skipped)}


class Learner:
    """The half of a PPO step that changes weights."""

    def __init__(self, config: PpoConfig, groups: Groups, preparation: Preparation) -> None:
        self.config = config
        self.groups = groups
        self.preparation = preparation
        self.policy_loss = make_policy_loss(config)
        self.value_loss = make_value_loss(config)

    def learn(
        self, batch: TrajectoryBatch, schedules: Schedules, *, train_policy: bool, kl_coefficient: float
    ) -> StepOutcome:
        """Run all updates of all passes over one step's batch; without ``train_policy`` only the critic learns."""
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
        """Accumulate gradients on all roles, then apply them on all, or on none if any rank saw NaN or Inf."""
        pending = {
            role: self.groups.trained[role].accumulate(
                shared, update, loss, denominator(loss.denominator, shared.batch, update.sequences)
            )
            for role, (update, loss) in jobs.items()
        }
        reports = {role: report.result() for role, report in pending.items()}
        skip = not all(report.finite for report in reports.values())
        applying = {role: self.groups.trained[role].apply(skip) for role in reports}
        outcome.add(reports, {role: applied.result() for role, applied in applying.items()})
