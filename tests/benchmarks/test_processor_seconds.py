"""Processor seconds of a step are those between the ends of its neighbours, by role."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.processor_seconds import by_role, per_step, role_of, watch

SPINS = (
    "import sys, time\n"
    "for step in range(3):\n"
    "    end = time.process_time() + 0.2\n"
    "    while time.process_time() < end: pass\n"
    "    open(sys.argv[1], 'a').write('{\"time/step\": 1}\\n')\n"
    "    time.sleep(0.15)\n"
)


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::PolicyModelActor.accumulate", "policy"),
        ("ray::RolloutActor", "rollout"),
        ("ray::IDLE", "driver"),
        ("python -m rlhf_ray train ppo", "driver"),
    ],
)
def test_a_process_counts_for_the_role_of_its_actor(title: str, role: str) -> None:
    assert role_of(title) == role


def test_a_step_lasts_from_one_line_of_metrics_to_the_next(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", SPINS, metrics]) as process:
        ends = watch(lambda: process.poll() is not None, process.pid, metrics)
    assert len(ends) == 3
    assert per_step(ends)["driver"] == pytest.approx(0.2, abs=0.08), "without starting Python"


def test_all_processes_below_the_root_count() -> None:
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    before = by_role(os.getpid())["driver"]
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        deadline = time.monotonic() + 30
        while by_role(os.getpid())["driver"] < before + 0.3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert by_role(os.getpid())["driver"] >= before + 0.3
        process.kill()


def test_one_step_has_no_mean() -> None:
    assert per_step([{"driver": 1.0}]) == {}
