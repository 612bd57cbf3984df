"""A run that goes on with other numbers of ranks, on the whole real stack.

What must hold: its steps have the same losses and gradients as those of a run that never stopped, and those of PPO the same
prompts and rewards; its attempts say what was changed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import metrics, run

CONFIG = Path(__file__).with_name("ppo_tiny.yaml")
SETTINGS = [
    "cluster.num_cpus=2", "rollout.engines=1", "reference=null", "checkpoint.every_steps=1", "evaluation.prompts=4",
    "policy.engine.zero=3", "critic.engine.zero=2",
    *(f"{role}.engine.optimizer.schedule=constant" for role in ("policy", "critic")),
    *(f"{role}.engine.optimizer.warmup_fraction=0" for role in ("policy", "critic")),
]  # fmt: skip
COMPARED = ("reward/mean", "reward/std", "loss/policy", "loss/value", "grad_norm/policy", "grad_norm/critic")
SFT = [
    "cluster.num_cpus=2", "policy.model.make.shape=llama-tiny", "policy.model.dtype=fp32", "policy.ranks=2",
    "policy.resources.cpus_per_rank=0.3", "policy.engine.zero=2",
    "policy.engine.optimizer={learning_rate: 0.005, weight_decay: 0.1, schedule: constant, warmup_fraction: 0}",
    "data.world.demonstrations=96", "batch.sequences_per_update=32", "evaluation.every_steps=0",
    "checkpoint.every_steps=3",
]  # fmt: skip


def changes_of(run: Path) -> list[dict[str, object]]:
    """What each attempt of a run changed, by key."""
    lines = (run / "attempts.jsonl").read_text().splitlines()
    return [{change["key"]: change["to"] for change in json.loads(line).get("changes", [])} for line in lines]


def left_beside_the_checkpoints(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]


@pytest.mark.long
def test_fine_tuning_by_two_ranks_goes_on_with_one_and_then_with_three(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run("train", "sft", "demo-sft", f"run.root={whole}", "epochs=3", *SFT)
    run("train", "sft", "demo-sft", f"run.root={moved}", "epochs=1", *SFT)
    run("resume", moved / "demo-sft", "epochs=2", "policy.ranks=1")
    run("resume", moved / "demo-sft", "epochs=3", "policy.ranks=3")

    one, other = (
        [
            (line["step"], line["loss/sft"], line["grad_norm"])
            for line in RunDirectory.open(root / "demo-sft").metrics.read()
            if "loss/sft" in line
        ]
        for root in (whole, moved)
    )
    assert [step for step, *_ in one] == list(range(1, 10))
    assert [value for line in other for value in line] == pytest.approx(
        [value for line in one for value in line], rel=1e-4
    )
    assert [change.get("policy.ranks") for change in changes_of(moved / "demo-sft")] == [None, 1, 3]
    assert left_beside_the_checkpoints(moved / "demo-sft") == []


@pytest.mark.long
def test_a_run_with_two_ranks_goes_on_with_one_and_then_with_three(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run("train", "ppo", CONFIG, f"run.root={whole}", "steps=3", *SETTINGS)
    run("train", "ppo", CONFIG, f"run.root={moved}", "steps=1", *SETTINGS)
    run("resume", moved / "tiny", "steps=2", "policy.ranks=1", "critic.ranks=2")
    run("resume", moved / "tiny", "steps=3", "policy.ranks=3")

    one, other = (metrics(root / "tiny") for root in (whole, moved))
    assert len(one) == len(other) == 3
    for expected, found in zip(one, other, strict=True):
        assert {key: found[key] for key in COMPARED} == pytest.approx(
            {key: expected[key] for key in COMPARED}, rel=1e-3, abs=1e-5
        )
    taken = [
        [entry.prompt_ids for entry in RunDirectory.open(root / "tiny").ledger.entries()] for root in (whole, moved)
    ]
    assert taken[0] == taken[1]
    changes = changes_of(moved / "tiny")
    assert [change.get("policy.ranks") for change in changes] == [None, 1, 3]
    assert [change.get("critic.ranks") for change in changes] == [None, 2, None]
    assert left_beside_the_checkpoints(moved / "tiny") == []
