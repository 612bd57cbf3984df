"""Update the weights from a batch with advantages: accumulate gradients, let all ranks vote, then apply or skip.

Invariants: policy and critic see the same sequences in the same update. The denominator of an update counts all its
sequences over all ranks and micro-batches. If any rank of either role saw NaN or Inf, or a guard finds that the loss of one of
them or the KL stands out, both keep their weights.

The norm of a gradient is known only while its step is made. The critic steps first: if its norm stands out, the policy keeps
its weights too. If that of the policy does, the critic has made its step, which was an ordinary one of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_ray.actors.groups import SharedBatch
from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import ValueLoss
from rlhf_ray.algorithms.policy_loss import PolicyLoss
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.models.devices import GpuPeak
from rlhf_ray.trainers.guards import GRADIENT_NORM, KL, LOSS, Guards
from rlhf_ray.trainers.ppo.algorithm import make_policy_loss, make_value_loss
from rlhf_ray.trainers.ppo.roles import Groups, Schedules
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Update


@dataclass
class StepOutcome:
    """Counts and metrics of the updates of one step."""

    updates: int = 0
    skipped: int = 0
    outliers: int = 0
    """How many of the skipped updates stood out."""
    stood_out: list[str] = field(default_factory=list)
    """What stood out in them, with its limit."""
    policy_applied: bool = False
    last_skips: int = 0
    """How many updates were skipped after the last one that was applied."""
    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    latest: dict[str, float] = field(default_factory=dict)

    def add(self, reports: Mapping[str, Report], applied: Mapping[str, Applied], stood_out: Sequence[str] = ()) -> None:
        """Count one update, by the reports and results of the roles that took part, and what stood out in it."""
        self.updates += 1
        self.outliers += bool(stood_out)
        self.stood_out += stood_out
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
        return {
            **means,
            **self.latest,
            "updates/skipped": float(self.skipped),
            "updates/stood_out": float(self.outliers),
        }


class Learner:
    """The half of a PPO step that changes weights."""

    def __init__(self, config: PpoConfig, groups: Groups, preparation: Preparation) -> None:
        self.config = config
        self.groups = groups
        self.preparation = preparation
        self.policy_loss = make_policy_loss(config)
        self.value_loss = make_value_loss(config)

    def learn(
        self,
        batch: TrajectoryBatch,
        schedules: Schedules,
        *,
        train_policy: bool,
        kl_coefficient: float,
        guards: Guards | None = None,
        step: int = 1,
    ) -> StepOutcome:
        """Run all updates of all passes over the batch of ``step``, which ``guards`` may skip and remember.

        Without ``train_policy`` only the critic learns.
        """
        guards = Guards(GuardsConfig()) if guards is None else guards
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
                self._update(shared, jobs, outcome, guards, step)
        return outcome

    def _update(
        self,
        shared: SharedBatch,
        jobs: Mapping[str, tuple[Update, PolicyLoss | ValueLoss]],
        outcome: StepOutcome,
        guards: Guards,
        step: int,
    ) -> None:
        """Accumulate gradients on all roles, then apply them on all, or on none if any rank saw NaN, Inf or an outlier."""
        pending = {
            role: self.groups.trained[role].accumulate(
                shared, update, loss, denominator(loss.denominator, shared.batch, update.sequences)
            )
            for role, (update, loss) in jobs.items()
        }
        reports = {role: report.result() for role, report in pending.items()}
        numbers = dict(_numbers(reports))
        stood_out = guards.outliers(numbers)
        skip = not all(report.finite for report in reports.values()) or bool(stood_out)
        applied = self._apply(skip, {role: guards.limit(GRADIENT_NORM + role) for role in reports})
        refused = {GRADIENT_NORM + role: result.refused_norm for role, result in applied.items()}
        stood_out += guards.outliers({name: norm for name, norm in refused.items() if norm is not None})
        outcome.add(reports, applied, stood_out)
        if any(result.skipped for result in applied.values()):
            guards.skip(step)
        else:
            norms = {GRADIENT_NORM + role: result.grad_norm for role, result in applied.items()}
            guards.applied(numbers | {name: norm for name, norm in norms.items() if norm is not None})

    def _apply(self, skip: bool, limits: Mapping[str, float]) -> dict[str, Applied]:
        """Take the step on all roles at once; where the norm of a gradient has a limit, on the critic first."""
        groups = self.groups.trained
        if skip or all(math.isinf(limit) for limit in limits.values()):
            applying = {role: groups[role].apply(skip) for role in limits}
            return {role: applied.result() for role, applied in applying.items()}
        applied = {}
        for role in sorted(limits, key=lambda role: role == "policy"):
            applied[role] = groups[role].apply(skip, limits[role]).result()
            skip |= applied[role].skipped
        return applied


def _numbers(reports: Mapping[str, Report]) -> Iterator[tuple[str, float]]:
    """What the guards look at before an update is applied."""
    for role, report in reports.items():
        yield LOSS + role, report.loss
        total, count = report.metrics.get("approximate_kl", (0.0, 0.0))
        if count:
            yield KL + role, total / count
