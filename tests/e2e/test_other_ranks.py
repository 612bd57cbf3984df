"""A run that goes on with other numbers of ranks, on the whole real stack.

What must hold: its steps take the same prompts, rewards and gradients as those of a run that never stopped, and its attempts
say what was changed.
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
    changes = [
        {change["key"]: change["to"] for change in json.loads(line)["changes"]}
        for line in (moved / "tiny" / "attempts.jsonl").read_text().splitlines()
    ]
    assert [change.get("policy.ranks") for change in changes] == [None, 1, 3]
    assert [change.get("critic.ranks") for change in changes] == [None, 2, None]
    left = [path.name for path in (moved / "tiny" / "checkpoints").iterdir() if not path.name.startswith("step-")]
    assert left == []
