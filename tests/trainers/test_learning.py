"""The floor under the learning curves: PPO and GRPO learn in the generated world, with plain classes in one process.

What must hold: from one policy that knows the answers no better than its demonstrations, 12 steps of either algorithm reach a
gold win rate over the start that chance and luck do not, near the start, and within a minute each. ``make bench`` takes the
figures themselves, on longer runs, against a learned reward and on three seeds (``benchmarks/learning.py``).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.supervised.sft import train_sft
from tests.trainers.glossary import unexplained

pytestmark = pytest.mark.early

WIN_RATE_FLOOR = 0.70
KL_LIMIT = 6.0
SECONDS = 60.0
"""Of this process's own work: what else the machine does counts for nothing."""
SHARED = ["monitoring.ray_metrics=false", "run.seed=0"]
POLICY = [
    "rollout.backend=transformers", "steps=12", "checkpoint.every_steps=0", "evaluation.best_of=0",
    "reward={function: world.gold}", "policy.engine.optimizer.learning_rate=6.0e-4",
]  # fmt: skip
PPO = ["algorithm.name=ppo", "algorithm.kl.coefficient=0.02", "critic.model.head_init=zero"]
GRPO = ["algorithm.name=grpo", "critic=null", "batch.prompts_per_step=32", "batch.samples_per_prompt=4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy trained on demonstrations of mixed quality."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("start")
    config: Any = load_config(
        "demo-sft", [f"run.root={root}", *SHARED, "policy.ranks=1", "data.world.demonstrations=4800"], kind="sft"
    )
    run = RunDirectory.create(root / config.run.name, dump_config(config))
    train_sft(config, run, None, place=ThisProcess(config.cluster))
    assert unexplained(run) == set()
    return run.final


@pytest.mark.parametrize("algorithm", [PPO, GRPO], ids=["ppo", "grpo"])
def test_it_learns(start: Path, tmp_path: Path, algorithm: list[str]) -> None:
    roles = [
        f"{role}.model.path={start}" for role in ("policy", "reference", *(["critic"] if algorithm is PPO else []))
    ]
    config: Any = load_config("demo-ppo", [f"run.root={tmp_path}", *SHARED, *roles, *POLICY, *algorithm], files=True)
    run = RunDirectory.create(tmp_path / config.run.name, dump_config(config))
    began = time.process_time()
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    assert time.process_time() - began < SECONDS
    figures = run.metrics.read()[-1]
    assert 0.25 < figures["evaluation/gold_start"] < 0.65
    assert figures["evaluation/gold_win_rate"] >= WIN_RATE_FLOOR
    assert figures["evaluation/kl"] <= KL_LIMIT
    assert run.ledger.verify(range(4000)) == 0
    assert unexplained(run) == set()
