"""The modes of rollout on the whole real stack, with two vLLM engines.

What must hold: two deterministic runs in ``one_step_off`` end with the same bits, although one of them loses an engine and is
itself killed and resumed; every prompt is used once in both.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import command, kill_an_engine, metrics, run, wait_for_step

CONFIG = Path(__file__).with_name("ppo_tiny.yaml")
SETTINGS = ["rollout.mode=one_step_off", "policy.ranks=1", "policy.engine.zero=0", "algorithm.name=grpo", "critic=null",
            "batch.samples_per_prompt=2"]  # fmt: skip
STEPS = 6


def kill_an_engine_and_then_the_driver(root: Path) -> None:
    """SIGKILL to an engine after step 2, and to the driver after step 5, whose samples no checkpoint has yet."""
    parent = subprocess.Popen(command("train", "ppo", CONFIG, f"run.root={root}", *SETTINGS), stderr=subprocess.DEVNULL)
    kill_an_engine(parent, root, after_step=2)
    wait_for_step(parent, root, 5)
    (driver,) = [child for child in psutil.Process(parent.pid).children() if "driver" in " ".join(child.cmdline())]
    os.kill(driver.pid, signal.SIGKILL)
    assert parent.wait(timeout=60) == 1


@pytest.mark.long
def test_two_deterministic_runs_one_step_off_have_the_same_bits_although_one_loses_an_engine_and_is_killed(
    tmp_path: Path,
) -> None:
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    run("train", "ppo", CONFIG, f"run.root={whole}", *SETTINGS)
    assert [line["rollout/staleness"] for line in metrics(whole / "tiny")] == [0.0, *[1.0] * (STEPS - 1)]

    kill_an_engine_and_then_the_driver(disturbed)
    assert RunDirectory.open(disturbed / "tiny").checkpoints.steps() == [2, 4]
    run("resume", disturbed / "tiny")
    taken = [
        [entry.prompt_ids for entry in RunDirectory.open(root / "tiny").ledger.entries()] for root in (whole, disturbed)
    ]
    assert taken[0] == taken[1] and max(Counter(prompt for ids in taken[1] for prompt in ids).values()) == 1
    one, other = (load_file(root / "tiny" / "final" / "model.safetensors") for root in (whole, disturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)
