"""``status`` and ``report`` read a run directory and change nothing of the run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_ray import storage
from rlhf_ray.cli.main import main
from rlhf_ray.monitoring.report.summary import Summary
from rlhf_ray.rollout.health import FleetHealth, HealthPolicy
from rlhf_ray.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two steps with a commit after the first, still owned by this process."""
    run = RunDirectory.create(tmp_path / "runs/small", "kind: sft\nrun: {name: small}\n")
    for step in (1, 2):
        run.metrics.append({"step": step, "timestamp": 1e9 + step, "loss/sft": 1.0 / step})
    pending = run.checkpoints.begin(1)
    storage.write_file(pending.path / "shard", "weights")
    run.checkpoints.commit(pending)
    return run


def told(capsys: pytest.CaptureFixture[str], run: RunDirectory) -> dict[str, str]:
    assert main(["status", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): value for name, _, value in (line.partition("  ") for line in lines)}


def test_status_tells_how_far_a_run_is(run, capsys):
    before = sorted(os.walk(run.path))
    status = {name: value.strip() for name, value in told(capsys, run).items()}
    assert status["kind"] == "sft" and status["steps"] == "2" and status["last commit"] == "step 1"
    assert status["state"] == "running"
    assert sorted(os.walk(run.path)) == before


def test_a_death_and_a_restart_of_an_engine_are_told_as_soon_as_the_driver_knows_and_of_a_running_run_alone(
    run, capsys
):
    health = FleetHealth(2, HealthPolicy(max_restarts=1))
    health.on_change = lambda: run.engines.write(health.plain())

    def engines() -> list[str]:
        return [value.strip() for name, value in told(capsys, run).items() if name.startswith("engine ")]

    assert engines() == []
    for engine in health.publish(7):
        health.updated(engine, 7, 0)
    assert engines() == ["healthy, weights 7, 0 restarts"] * 2
    health.died(1, "out of memory\nat line 1", 0)
    assert engines()[1] == "dead, no weights, 0 restarts: out of memory"
    assert health.restart(1) == 1
    assert engines()[1] == "restarting, no weights, 1 restarts: out of memory"
    health.started(1, 1)
    health.updated(1, 7, 1)
    assert engines()[1] == "healthy, weights 7, 1 restarts"
    for engine in health.publish(8):
        health.updated(engine, 8, health[engine].incarnation)
    assert engines()[0] == "healthy, weights 7, 0 restarts", "a publication alone writes nothing"
    run.engines.write(health.plain())  # at the end of the step
    assert engines()[0] == "healthy, weights 8, 0 restarts"
    health.died(1, "killed", 1)
    assert engines()[1] == "retired, no weights, 1 restarts: killed"
    run.release()
    assert engines() == [], "the engines of a run that has stopped are no more"
    again, _ = RunDirectory.resume(run.path)
    assert engines() == [], "nor are they when it goes on"
    again.release()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"state": "healthy"}]', "[" * 5000, "\x00\xff"])
def test_a_file_of_engines_that_says_nothing_of_engines_is_left_out(run, capsys, content):
    run.engines.path.write_bytes(content.encode("latin-1"))
    assert not any(name.startswith("engine ") for name in told(capsys, run))


def test_a_stopped_run_says_how_to_go_on_and_a_finished_one_that_it_is(run, capsys):
    run.release()
    assert f"rlhf-ray resume {run.path}" in told(capsys, run)["state"]
    run.write_summary(Summary())
    assert told(capsys, run)["state"].strip() == "finished"


def test_a_run_without_a_step_has_a_status(tmp_path, capsys):
    run = RunDirectory.create(tmp_path / "new", "kind: ppo\n")
    assert told(capsys, run)["last commit"].strip() == "none"


def test_report_is_written_again_from_the_files(run, capsys):
    assert main(["report", str(run.path)]) == 0
    assert Path(capsys.readouterr().out.strip()) == run.report_path
    assert "loss/sft" in run.report_path.read_text()


def test_several_runs_come_side_by_side_where_asked(run, tmp_path, capsys):
    other = RunDirectory.create(tmp_path / "runs/other", "kind: sft\n")
    other.metrics.append({"step": 1, "timestamp": 1e9, "loss/sft": 2.0})
    both = tmp_path / "both.html"
    assert main(["report", str(run.path), str(other.path), "--output", str(both)]) == 0
    page = both.read_text()
    assert "small" in page and "other" in page
    assert not run.report_path.exists()
