"""With ``algorithm.old_log_probs: rollout`` a step learns from the log-probs that came with its samples.

What must hold: the policy runs no forward pass of its own for them; they are the engine's to the bit; nothing is said of a
difference that nobody measured; and that trainer and engine agree is still checked, at the start and after the first update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.workers.policy import PolicyWorker
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.ppo.self_check import CHECKED_PROMPTS, LOG_PROBS, UPDATED_LOG_PROBS
from rlhf_ray.trainers.ppo.update import Learner

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
PROMPTS, STEPS = 2 * CHECKED_PROMPTS, 2
SETTINGS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1", f"steps={STEPS}",
            "monitoring.ray_metrics=false", "evaluation={prompts: 2}", "checkpoint.every_steps=0",
            f"batch={{prompts_per_step: {PROMPTS}, samples_per_prompt: 1, sequences_per_update: {PROMPTS}, passes_per_step: 1, "
            "max_tokens_per_micro_batch: 2048}", "algorithm.importance.level=none"]  # fmt: skip


class Watched:
    """What a run's updates read, and how many sequences each of the policy's forward passes had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.learned: list[Any] = []
        self.passes: list[int] = []
        learn, log_probs = Learner.learn, PolicyWorker.log_probs

        def watched_learn(learner: Any, batch: Any, *rest: Any, **named: Any) -> Any:
            self.learned.append(batch)
            return learn(learner, batch, *rest, **named)

        def watched_log_probs(worker: Any, batch: Any, micro_batches: Any) -> Any:
            self.passes.append(sum(map(len, micro_batches)))
            return log_probs(worker, batch, micro_batches)

        monkeypatch.setattr(Learner, "learn", watched_learn)
        monkeypatch.setattr(PolicyWorker, "log_probs", watched_log_probs)


def train(root: Path, *overrides: str) -> RunDirectory:
    torch.set_num_threads(1)
    config: Any = load_config(TINY_PPO, [f"run.root={root}", *SETTINGS, *overrides], kind="ppo")
    run = RunDirectory.create(root / config.run.name, dump_config(config))
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    return run


def test_a_step_learns_from_the_engines_log_probs_without_a_pass_of_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    run = train(tmp_path, "algorithm.old_log_probs=rollout")
    assert len(watched.learned) == STEPS and max(watched.passes) < PROMPTS
    for batch in watched.learned:
        actions = batch["action_mask"]
        assert torch.equal(batch["log_probs"], batch["rollout_log_probs"]) and bool(
            (batch["log_probs"][actions] < 0).all()
        )
        assert "importance_weights" not in batch
    lines = [line for line in run.metrics.read() if "ratio/mean" in line]
    assert len(lines) == STEPS
    for line in lines:
        assert abs(line["ratio/mean"] - 1.0) < 1e-4, (
            "the trainer computes what the engine did: one update a step, in fp32"
        )
        said = [name for name in line if "log_prob_difference" in name or name.startswith("importance/")]
        assert said == [] and "rollout/kl" not in line
    checks = [check.name for check in run.summary().checks]
    assert checks.count(LOG_PROBS) == checks.count(UPDATED_LOG_PROBS) == 1


def test_by_default_the_policy_computes_them_in_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    run = train(tmp_path)
    assert watched.passes.count(PROMPTS) == STEPS
    for batch in watched.learned:
        assert not torch.equal(batch["log_probs"], batch["rollout_log_probs"])
        assert torch.allclose(batch["log_probs"], batch["rollout_log_probs"], atol=1e-4)
    assert all("rollout/log_prob_difference" in line for line in run.metrics.read() if "ratio/mean" in line)
