"""How checks are run: each alone, within its time, and with a reason where it is not run."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from rlhf_ray.config.loading import load_config
from tests.gpu.checks import CHECKS, Check
from tests.gpu.perform import run_here
from tests.gpu.run import _run
from tests.gpu.stack import BY_TURNS, CONFIG, OF_ITS_OWN, OVERRIDES

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs the checks: make gpu")
def test_without_a_gpu_everything_is_left_out_and_nothing_fails(tmp_path: Path) -> None:
    options = ["--results", str(tmp_path / "gpu.json"), "--wheels", str(tmp_path)]
    command = [sys.executable, "-m", "tests.gpu.run", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *lines, counts = done.stdout.splitlines()
    assert [line.split()[2].rstrip(":") for line in lines] == [check.name for check in CHECKS]
    assert all(line.startswith("left out") and "torch sees no GPU" in line for line in lines)
    assert counts == f"0 passed, 0 failed, {len(CHECKS)} left out"
    assert not (tmp_path / "gpu.json").exists()
    assert (tmp_path / "gpu.log").read_text() == done.stdout


def test_every_check_is_a_function_that_can_be_imported() -> None:
    for check in CHECKS:
        assert callable(getattr(importlib.import_module(f"tests.gpu.{check.module}"), check.function)), check.name
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def behaviour(function: str, *, limit_s: float = 60.0, **options: str) -> Check:
    """A check of ``behaviours``."""
    return Check(function, (), "behaviours", function, options, limit_s)


def run(check: Check, results: Path, *, seconds: float = 60.0) -> str:
    """How it ends in a process of its own."""
    return _run(check, "cpu", results, time.monotonic() + seconds, multiprocessing.get_context("spawn"))


def test_a_check_that_fails_or_crashes_costs_no_other_its_run_or_its_figures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "gpu.json"
    endings = [run(behaviour(name), results) for name in ("fail", "crash", "pass_with_figure")]
    assert endings == ["failed", "failed", "passed"]
    assert json.loads(results.read_text())["figures"]["on cpu"]["value"] == 1
    log = results.with_suffix(".log").read_text()
    assert "off by one" in log and "crash: its process ended with -11" in log and "on cpu  1" in log
    assert capfd.readouterr().out == log


def test_a_check_that_hangs_is_killed_in_its_time_with_all_that_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pid_file = tmp_path / "pid"
    hangs = behaviour("hang_with_a_child", limit_s=6.0, pid_file=str(pid_file))
    began = time.monotonic()
    assert run(hangs, tmp_path / "gpu.json") == "failed"
    assert time.monotonic() - began < 20
    assert _ended(int(pid_file.read_text()))
    assert "in hang_with_a_child" in capfd.readouterr().err, "where it stood is not told"


def test_what_is_cut_off_by_the_end_of_all_is_left_out_and_not_failed(tmp_path: Path) -> None:
    hangs = behaviour("hang_with_a_child", limit_s=60.0, pid_file=str(tmp_path / "pid"))
    assert run(hangs, tmp_path / "gpu.json", seconds=2.0) == "left out"
    assert run(behaviour("pass_with_figure"), tmp_path / "gpu.json", seconds=0.0) == "left out"
    log = (tmp_path / "gpu.log").read_text()
    assert "the time was over after its first 2 s" in log and "pass_with_figure: there was no time left" in log


def _ended(pid: int) -> bool:
    """Whether a process is gone, or dead and nobody has asked how."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_check_in_this_process_tells_how_it_ended(tmp_path: Path) -> None:
    assert not run_here(behaviour("fail"), "cpu", tmp_path / "gpu.json")
    assert run_here(behaviour("pass_with_figure"), "cpu", tmp_path / "gpu.json")


def test_the_configs_of_the_whole_stack_are_accepted() -> None:
    assert load_config(CONFIG, OVERRIDES, kind="ppo").policy.resources.gpus_per_rank == 0.15
    assert load_config(CONFIG, OVERRIDES + OF_ITS_OWN, kind="ppo").rollout.resources.gpus_per_rank == 1
    assert load_config(CONFIG, OVERRIDES + BY_TURNS, kind="ppo").placements()[0].resources.gpus_per_rank == 0.2
