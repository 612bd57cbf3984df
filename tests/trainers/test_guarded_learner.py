"""What policy and critic do with an update of which a number stands out, on groups that remember what they were asked."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_ray.actors.groups import SharedBatch
from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.pending import Pending
from rlhf_ray.trainers.guards import Guards
from rlhf_ray.trainers.ppo.algorithm import make_preparation
from rlhf_ray.trainers.ppo.roles import Groups
from rlhf_ray.trainers.ppo.update import Learner, StepOutcome
from rlhf_ray.trajectories.batch import TrajectoryBatch
from tests.trainers.test_schedules import CONFIG


class Trained:
    """A group whose losses, norms and KL are given."""

    size = 1

    def __init__(self, role: str, log: list[str]) -> None:
        self.role, self.log = role, log
        self.loss, self.norm, self.kl = 1.0, 1.0, 0.0

    def share(self, batch: TrajectoryBatch) -> SharedBatch:
        return SharedBatch(batch, None)

    def accumulate(self, shared: SharedBatch, update: Any, loss: Any, count: float) -> Pending[Report]:
        metrics = {"approximate_kl": (self.kl, 1.0)} if self.role == "policy" else {}
        return Pending.done(Report(math.isfinite(self.loss), self.loss, metrics))

    def apply(self, skip: bool, limit: float = math.inf) -> Pending[Applied]:
        refused = self.norm if not skip and self.norm > limit else None
        skipped = skip or refused is not None
        self.log.append(f"{self.role} {'keeps' if skipped else 'steps'}")
        return Pending.done(Applied(skipped, None if skipped else self.norm, 0.1, 1, refused_norm=refused))


def learn(trained: dict[str, Trained], learner: Learner, guards: Guards) -> StepOutcome:
    """One update of a batch of four sequences."""
    outcome = StepOutcome()
    batch = TrajectoryBatch.from_sequences([[1, 2]] * 4, action_mask=[[False, True]] * 4)
    schedules = learner.groups.schedules(batch, 1)
    jobs: Any = {
        role: (schedules[role].updates[0], learner.policy_loss if role == "policy" else learner.value_loss)
        for role in trained
    }
    learner._update(SharedBatch(batch, None), jobs, outcome, guards, step=9)
    return outcome


@pytest.mark.parametrize(
    ("role", "number", "value", "expected", "reason"),
    [
        ("policy", "norm", 1.0, ["critic steps", "policy steps"], None),
        ("critic", "norm", 9.0, ["critic keeps", "policy keeps"], "grad_norm/critic 9 above 1.5"),
        ("policy", "norm", 9.0, ["critic steps", "policy keeps"], "grad_norm/policy 9 above 1.5"),
        ("critic", "loss", 9.0, ["critic keeps", "policy keeps"], "loss/critic 9 above 1.5"),
        ("policy", "loss", 9.0, ["critic keeps", "policy keeps"], "loss/policy 9 above 1.5"),
        ("policy", "kl", 0.2, ["critic keeps", "policy keeps"], "kl/policy 0.2 above 0.1"),
        ("critic", "loss", math.nan, ["critic keeps", "policy keeps"], None),
    ],
)
def test_what_stands_out_changes_neither_model_but_for_a_norm_of_the_policy_alone(
    role: str, number: str, value: float, expected: list[str], reason: str | None
) -> None:
    log: list[str] = []
    trained = {name: Trained(name, log) for name in ("policy", "critic")}
    config = parse_config(CONFIG)
    groups: Any = Groups(config, **trained, reference=None, rewards={})  # type: ignore[arg-type]
    learner = Learner(config, groups, make_preparation(config))  # type: ignore[arg-type]
    guards = Guards(GuardsConfig(gradient_norm=10.0, loss=10.0, kl_above=0.1, window=8))
    for _ in range(8):
        assert learn(trained, learner, guards).skipped == 0
    del log[:]
    setattr(trained[role], number, value)
    outcome = learn(trained, learner, guards)
    assert sorted(log) == sorted(expected) and (value != 9.0 or number != "norm" or log == expected)
    assert outcome.stood_out == ([] if reason is None else [reason])
    skipped = int(expected != ["critic steps", "policy steps"])
    assert (outcome.skipped, guards.skipped, guards.first_skip) == (skipped, skipped, 9 * skipped)
    assert outcome.metrics["updates/stood_out"] == float(reason is not None)
    assert outcome.policy_applied == (not skipped)
