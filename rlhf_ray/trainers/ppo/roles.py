"""The model groups of a PPO run: those that its algorithm and its rewards need, and no others.

Always true: the columns of a batch come from the groups that are there, all at once; who reads a column that no group
gives is told its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_ray.actors.groups import CriticGroup, Group, PolicyGroup, ReferenceGroup, RewardGroup
from rlhf_ray.pending import Pending
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule


@dataclass(frozen=True)
class Groups:
    """No critic where the algorithm has none, no reference where no KL is measured, no reward where a function scores."""

    policy: PolicyGroup
    critic: CriticGroup | None = None
    reference: ReferenceGroup | None = None
    rewards: Mapping[str, RewardGroup] = field(default_factory=dict)
    """By the keys of their sections."""

    @property
    def by_role(self) -> dict[str, Group]:
        """Those that are there, without the rewards'."""
        every = {"policy": self.policy, "critic": self.critic, "reference": self.reference}
        return {role: group for role, group in every.items() if group is not None}

    @property
    def trained(self) -> dict[str, Group]:
        """Those that learn, and that a checkpoint holds."""
        return {role: group for role, group in self.by_role.items() if role in ("policy", "critic")}

    @property
    def results(self) -> dict[str, tuple[Group, Mapping[str, Any]]]:
        """Those whose models stand in ``final/``, by their place there."""
        return {"" if role == "policy" else role: (group, {}) for role, group in self.trained.items()}

    def columns(
        self, trajectories: TrajectoryBatch, schedules: Mapping[str, Schedule]
    ) -> dict[str, Pending[torch.Tensor]]:
        """Log-probs, values and reference log-probs, begun on all groups at once."""
        shared = self.policy.share(trajectories)
        pending = {"log_probs": self.policy.log_probs(shared, schedules["policy"])}
        if self.critic is not None:
            pending["values"] = self.critic.values(shared, schedules["critic"])
        if self.reference is not None:
            pending["reference_log_probs"] = self.reference.log_probs(shared, schedules["reference"])
        return pending
