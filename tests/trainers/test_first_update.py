"""Old log-probs come from a call of their own, and the first update still sees ratios of exactly 1.

With the same schedule exactly, in any precision; with another packing within rounding: 1e-5 in fp32 and 2e-2 in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import LossOutput, PolicyOutputs
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, KlTerm, PolicyLoss
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.models.forward import log_prob_blocks
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import make_schedule

LENGTHS = [5, 23, 9, 17, 3, 30, 12, 8]
LOSSES = {
    "ppo": PolicyLoss(Clipped(0.2, 0.2), entropy_coefficient=0.01),
    "grpo": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences", kl=KlTerm(0.05, "k3")),
    "gspo": PolicyLoss(Clipped(3e-4, 4e-4), ratio="sequence", aggregation="sequences"),
    "rloo": PolicyLoss(Clipped(0.2, 0.2), ratio="trajectory", aggregation="sequences"),
    "cispo": PolicyLoss(Cispo(None, 4.0)),
    "dppo": PolicyLoss(Dppo("tv", 0.2, 0.2)),
}


@dataclass
class Watched:
    """A loss that notes how far any ratio is from 1."""

    loss: PolicyLoss
    far: list[float] = field(default_factory=list)

    def __call__(self, outputs: PolicyOutputs, part: TrajectoryBatch) -> LossOutput:
        moved = (outputs.log_probs.float() - part["log_probs"])[part["action_mask"]].detach()
        self.far += [float((moved.exp() - 1).abs().max())] if len(moved) else []
        return self.loss(outputs, part)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def policy(request: pytest.FixtureRequest) -> PolicyGroup:
    torch.set_num_threads(1)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    make = MakeConfig(shape="llama-tiny", tokenizer_from="world", seed=3)
    role = RoleConfig(
        model=ModelConfig(make=make, dtype=request.param), engine=EngineConfig(zero=0, optimizer=optimizer)
    )
    group = PolicyGroup(InProcessRanks("policy", PolicyWorker()))
    group.setup(LanguageSetup(role, seed=0, total_updates=9, temperature=0.8), timeout_s=60.0).result()
    return group


def batch_with_old_log_probs(policy: PolicyGroup, schedule: Any) -> TrajectoryBatch:
    generator = torch.Generator().manual_seed(7)
    batch = TrajectoryBatch.from_sequences(
        [torch.randint(2, 60, (length,), generator=generator).tolist() for length in LENGTHS],
        action_mask=[[False, False] + [True] * (length - 2) for length in LENGTHS],
    )
    advantages = torch.randn(batch.num_tokens, generator=generator)
    log_probs = policy.log_probs(policy.share(batch), schedule).result()
    return batch.with_columns(log_probs=log_probs, reference_log_probs=log_probs, advantages=advantages)


@pytest.mark.parametrize("name", LOSSES)
def test_on_the_same_schedule_the_first_ratio_is_exactly_one(policy: PolicyGroup, name: str) -> None:
    schedule = make_schedule(LENGTHS, ranks=1, max_tokens=40, sequences_per_update=4, order=[3, 1, 0, 2, 7, 6, 5, 4])
    batch, watched = batch_with_old_log_probs(policy, schedule), Watched(LOSSES[name])
    update = schedule.updates[0]
    count = denominator(watched.loss.denominator, batch, update.sequences)
    report = policy.accumulate(policy.share(batch), update, watched, count).result()
    policy.apply(True).result()
    total, actions = report.metrics["ratio/mean"]
    assert total == actions == sum(LENGTHS[row] - 2 for row in update.sequences)
    assert report.metrics["clip_fraction"][0] == report.metrics["approximate_kl"][0] == 0.0
    assert max(watched.far) == 0.0


def test_with_another_packing_it_is_one_within_rounding(policy: PolicyGroup) -> None:
    once = make_schedule(LENGTHS, ranks=1, max_tokens=40, sequences_per_update=4, order=[3, 1, 0, 2, 7, 6, 5, 4])
    batch, watched = batch_with_old_log_probs(policy, once), Watched(LOSSES["ppo"])
    again = make_schedule(LENGTHS, ranks=1, max_tokens=107)
    assert len(again.updates[0].rank(0)) < sum(len(update.rank(0)) for update in once.updates)
    report = policy.accumulate(policy.share(batch), again.updates[0], watched, 1.0).result()
    policy.apply(True).result()
    bound = {"fp32": 1e-5, "bf16": 2e-2}[policy.ranks.worker.config.model.dtype]  # type: ignore[attr-defined]
    assert max(watched.far) <= bound
    assert report.metrics["clip_fraction"][0] == 0.0


@pytest.mark.parametrize(("name", "keeps"), [("ppo", False), ("rloo", True)])
def test_an_update_keeps_probabilities_unless_its_loss_depends_on_entropies(
    policy: PolicyGroup, monkeypatch: pytest.MonkeyPatch, name: str, keeps: bool
) -> None:
    schedule = make_schedule(LENGTHS, ranks=1, max_tokens=107, sequences_per_update=8)
    batch, kept, original = batch_with_old_log_probs(policy, schedule), list[bool](), log_prob_blocks._of_block

    def noted(*arguments: Any) -> Any:
        kept.append(arguments[-1] is not None)
        return original(*arguments)

    monkeypatch.setattr(log_prob_blocks, "_of_block", noted)
    policy.accumulate(policy.share(batch), schedule.updates[0], LOSSES[name], 1.0).result()
    policy.apply(True).result()
    assert kept and set(kept) == {keeps}


def test_the_output_layer_runs_for_sampled_tokens_alone_also_for_those_that_the_loss_leaves_out(
    policy: PolicyGroup,
) -> None:
    schedule = make_schedule(LENGTHS, ranks=1, max_tokens=107, sequences_per_update=8)
    batch, watched = batch_with_old_log_probs(policy, schedule), Watched(LOSSES["ppo"])
    batch = batch.with_columns(weight_version=torch.where(batch["action_mask"], 0, -1).int())
    read = list[int]()
    head = policy.ranks.worker.actor.log_prob_head  # type: ignore[attr-defined]
    hook = head.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    try:
        log_probs = policy.log_probs(policy.share(batch), schedule).result()
        left_out = batch["action_mask"].clone()
        left_out[: LENGTHS[0]] = False
        trained = batch.with_columns(action_mask=left_out)
        policy.accumulate(policy.share(trained), schedule.updates[0], watched, 1.0).result()
        policy.apply(True).result()
    finally:
        hook.remove()
    assert torch.equal(log_probs, batch["log_probs"])
    assert not log_probs[~batch["action_mask"]].any() and log_probs[batch["action_mask"]].all()
    assert sum(read) == 2 * sum(length - 2 for length in LENGTHS)
    assert max(watched.far) == 0.0
