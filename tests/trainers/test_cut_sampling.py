"""PPO in one process with top-p and top-k: engine and trainer agree, the first ratio is exactly 1, and it learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import NumericalError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo import experience
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.ppo.self_check import LOG_PROBS

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
SETTINGS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1", "steps=2",
            "monitoring.ray_metrics=false", "evaluation={prompts: 2}", "checkpoint.every_steps=0", "rollout.top_p=0.9",
            "rollout.top_k=50", "algorithm.kl.coefficient=0.1", "batch.prompts_per_step=8",
            "batch.sequences_per_update=4"]  # fmt: skip


def train(root: Path) -> RunDirectory:
    torch.set_num_threads(1)
    config: Any = load_config(TINY_PPO, [f"run.root={root}", *SETTINGS], kind="ppo")
    run = RunDirectory.create(root / config.run.name, dump_config(config))
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    return run


def test_trainer_and_engine_agree_over_the_cut_distribution_in_every_step(tmp_path: Path) -> None:
    lines = list(train(tmp_path).metrics.read())
    differences = [line["rollout/log_prob_difference"] for line in lines if "rollout/log_prob_difference" in line]
    assert len(differences) == 2 and max(differences) < 1e-4
    first = next(line["kl/k3"] for line in lines if "kl/k3" in line)
    assert abs(first) < 1e-4, "at first the policy is the reference, whose log-probs are over the same sets"


def test_a_trainer_that_ignores_the_sets_fails_the_self_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.actors.workers.policy import ReferenceWorker

    monkeypatch.setattr(ReferenceWorker, "over_kept_sets", False)
    with pytest.raises(NumericalError, match=re.escape(LOG_PROBS)):
        train(tmp_path)


def test_samples_without_their_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = experience.Experience.gather
    monkeypatch.setattr(
        experience.Experience,
        "gather",
        lambda self, trajectories, *rest, **named: gather(self, trajectories.without_kept(), *rest, **named),
    )
    with pytest.raises(Exception, match="lack the columns kept_sizes and kept_words"):
        train(tmp_path)
