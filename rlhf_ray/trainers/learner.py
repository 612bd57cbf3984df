"""From a batch with advantages to new weights: schedules, denominators, accumulate, vote, apply.

Always true: policy and critic see the same sequences in the same update; the denominator of an update counts all its
sequences over all ranks and micro-batches; if any rank of either saw NaN or Inf, both leave their weights as they were.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_ray.actors.groups import Group, SharedBatch
from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import PolicyLoss, ValueLoss
from rlhf_ray.config.schema import PpoConfig
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule, Update, make_schedule


@dataclass(frozen=True)
class Schedules:
    """How one step's batch is cut: one schedule a role, those of policy and critic with the same updates."""

    policy: Schedule
    critic: Schedule
    reference: Schedule


@dataclass
class Outcome:
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

    def __init__(self, config: PpoConfig, policy: Group, critic: Group, reference: Group) -> None:
        self.config = config
        self.policy = policy
        self.critic = critic
        self.reference = reference
        algorithm = config.algorithm
        self.policy_loss = PolicyLoss(
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            entropy_coefficient=algorithm.entropy_coefficient,
        )
        self.value_loss = ValueLoss(clip=algorithm.value_clip)
        self.budgets = {
            "policy": config.policy.training_tokens(config.batch),
            "critic": config.critic.training_tokens(config.batch),
            "reference": config.reference_role.forward_tokens(config.batch),
        }

    def schedules(self, trajectories: TrajectoryBatch, step: int) -> Schedules:
        """Cut one step's batch for every role; the sequences of an update are drawn without clocks or global state."""
        lengths = trajectories.lengths.tolist()
        order = list(range(len(lengths)))
        random.Random(f"{self.config.run.seed}/{step}/updates").shuffle(order)
        size = self.config.batch.sequences_per_update

        def cut(group: Group, role: str, per_update: int | None) -> Schedule:
            return make_schedule(
                lengths, ranks=group.size, max_tokens=self.budgets[role], sequences_per_update=per_update, order=order
            )

        return Schedules(
            policy=cut(self.policy, "policy", size),
            critic=cut(self.critic, "critic", size),
            reference=cut(self.reference, "reference", None),
        )

    def learn(self, batch: TrajectoryBatch, schedules: Schedules, *, train_policy: bool) -> Outcome:
        """All updates of all passes over one step's batch."""
        shared = self.policy.share(batch)
        outcome = Outcome()
        for _ in range(self.config.batch.passes_per_step):
            for policy_update, critic_update in zip(schedules.policy.updates, schedules.critic.updates, strict=True):
                self._update(shared, policy_update if train_policy else None, critic_update, outcome)
        return outcome

    def _update(
        self, shared: SharedBatch, policy_update: Update | None, critic_update: Update, outcome: Outcome
    ) -> None:
        """Accumulate on both, let all ranks vote, apply on both or on none."""
        tokens = denominator(self.policy_loss.denominator, shared.batch, critic_update.sequences)
        pending = {"critic": self.critic.accumulate(shared, critic_update, self.value_loss, tokens)}
        if policy_update is not None:
            pending["policy"] = self.policy.accumulate(shared, policy_update, self.policy_loss, tokens)
        reports = {role: one.result() for role, one in pending.items()}
        skip = not all(report.finite for report in reports.values())
        groups = {"policy": self.policy, "critic": self.critic}
        steps = {role: groups[role].apply(skip) for role in reports}
        outcome.add(reports, {role: one.result() for role, one in steps.items()})
