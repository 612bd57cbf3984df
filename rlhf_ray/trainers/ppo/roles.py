"""The model groups of a PPO run, and how they divide a step's batch among their ranks.

Invariants: there are only the groups that the algorithm and the rewards need. Policy and critic see the same sequences in
the same update. Which sequences these are depends on the seed and the step alone. The columns of a batch come from all
groups at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_ray.actors.groups import CriticGroup, Group, PolicyGroup, ReferenceGroup, RewardGroup
from rlhf_ray.config.files.tokenizers import different_tokenizer
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule, make_schedule

TRAINED = ("policy", "critic")
"""Roles that learn, where a run has them."""

Schedules = Mapping[str, Schedule]
"""How the batch of one step is divided, by role; those of policy and critic have the same updates."""


@dataclass(frozen=True)
class Groups:
    """The groups of a run, by their roles.

    There is no critic if the algorithm has none, no reference if no KL is measured, and no reward model if functions or
    scoring backends give all rewards.
    """

    config: PpoConfig
    policy: PolicyGroup
    critic: CriticGroup | None = None
    reference: ReferenceGroup | None = None
    rewards: Mapping[str, RewardGroup] = field(default_factory=dict)
    """Reward models by the keys of their sections in the config."""

    @property
    def by_role(self) -> dict[str, Group]:
        """All groups but those of reward models."""
        every = {"policy": self.policy, "critic": self.critic, "reference": self.reference}
        return {role: group for role, group in every.items() if group is not None}

    def check_vocabularies(self) -> None:
        """Refuse a critic or reference that was loaded with another tokenizer than the policy, whose ids it reads.

        Only loading shows those of a hub, and those that are made. Embeddings may be padded differently.
        """
        pending = {role: group.vocabulary() for role, group in self.by_role.items()}
        loaded = {role: answer.result() for role, answer in pending.items()}
        policy = loaded.pop("policy")
        models = {"critic": self.config.critic, "reference": self.config.reference_role}
        for role, vocabulary in loaded.items():
            section = models[role]
            assert section is not None, "a group has a section"
            if vocabulary.fingerprint != policy.fingerprint:
                reason = different_tokenizer(role, section.model, self.config.policy.model)
                raise RequestError(f"{role}.model: {reason}")
            if vocabulary.rows < policy.rows:
                get_logger("ppo").warning(
                    "%s.model: its embedding has %d rows and the policy's %d: ids beyond the tokenizer's, which the policy may "
                    "sample all the same, could not be read", role, vocabulary.rows, policy.rows,
                )  # fmt: skip

    @property
    def trained(self) -> dict[str, Group]:
        """The groups that learn; a checkpoint holds the state of each."""
        return {role: group for role, group in self.by_role.items() if role in TRAINED}

    @property
    def results(self) -> dict[str, tuple[Group, Mapping[str, Any]]]:
        """The groups whose models are written to ``final/``, each with its directory there and facts for its config."""
        return {"" if role == "policy" else role: (group, {}) for role, group in self.trained.items()}

    def schedules(self, trajectories: TrajectoryBatch, step: int) -> Schedules:
        """Divide one step's batch for every role.

        Make them once a step, right after the rollout: log-probs, values and the first pass must use the same packs, so
        that the first ratio is exactly 1.
        """
        lengths = trajectories.lengths.tolist()
        order = list(range(len(lengths)))
        random.Random(f"{self.config.run.seed}/{step}/updates").shuffle(order)
        size = self.config.batch.sequences_per_update
        return {
            role: make_schedule(
                lengths,
                ranks=group.size,
                max_tokens=self._tokens_per_micro_batch(role),
                sequences_per_update=size if role in TRAINED else None,
                order=order,
            )
            for role, group in self.by_role.items()
        }

    def columns(
        self, trajectories: TrajectoryBatch, schedules: Schedules, *, log_probs: bool
    ) -> dict[str, Pending[torch.Tensor]]:
        """Log-probs of the policy if ``log_probs``, values and reference log-probs, begun on all groups at once."""
        shared = self.policy.share(trajectories)
        pending = {}
        if log_probs:
            pending["log_probs"] = self.policy.log_probs(shared, schedules["policy"])
        if self.critic is not None:
            pending["values"] = self.critic.values(shared, schedules["critic"])
        if self.reference is not None:
            pending["reference_log_probs"] = self.reference.log_probs(shared, schedules["reference"])
        return pending

    def _tokens_per_micro_batch(self, role: str) -> int:
        if role == "reference":
            assert self.config.reference_role is not None
            return self.config.reference_role.forward_tokens(self.config.batch)
        trained = self.config.policy if role == "policy" else self.config.critic
        assert trained is not None
        return trained.training_tokens(self.config.batch)
