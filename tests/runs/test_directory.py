"""A run directory is never written over, has one owner, and goes on exactly where its checkpoint stands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray import storage
from rlhf_ray.errors import RequestError
from rlhf_ray.monitoring import Check, Figure, MetricsLog, Sample, Summary, Table
from rlhf_ray.monitoring.report.summary import Answer
from rlhf_ray.runs import RunDirectory, checkpoints, directory, ledger, write_report
from rlhf_ray.storage import atomic, jsonl
from rlhf_ray.storage.jsonl import JsonLines
from rlhf_ray.storage.locks import is_taken

CrashEverywhere = Callable[[Path, Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]
CONFIG = "kind: ppo\nrun:\n  name: demo\n"
PROMPTS, PER_STEP, STEPS, EVERY = 6, 2, 6, 2


def train(path: Path, steps: int = STEPS, keep: int = 2) -> None:
    """The files of a run as a driver writes them: begins or goes on, a checkpoint every second step, a final model."""
    if (path / "config.yaml").exists():
        run, checkpoint = RunDirectory.resume(path, keep)
    else:
        run, checkpoint = RunDirectory.create(path, CONFIG, keep), None
    done = 0 if checkpoint is None else checkpoint.step
    weights = b"0" if checkpoint is None else (checkpoint.path / "weights").read_bytes()
    log = MetricsLog(run.metrics)
    for step in range(done + 1, steps + 1):
        weights += b"%d" % step
        log.log(step, {"reward/mean": float(len(weights))})
        run.write_samples(step, [{"step": step}])
        run.ledger.append(step, [(step * PER_STEP + offset) % PROMPTS for offset in range(PER_STEP)])
        if step % EVERY == 0:
            pending = run.checkpoints.begin(step)
            (pending.path / "weights").write_bytes(weights)
            run.checkpoints.commit(pending)
    final = run.begin_final()
    (final.path / "model.safetensors").write_bytes(weights)
    storage.commit(final)
    run.release()


def outcome(path: Path) -> dict[str, Any]:
    """All that must be the same whether or not the run was ever killed."""
    run = RunDirectory.open(path)
    assert run.ledger.verify(range(PROMPTS)) == STEPS * PER_STEP // PROMPTS
    storage.verify(run.final)
    return {
        "final": (run.final / "model.safetensors").read_bytes(),
        "metrics": [(line["step"], line["reward/mean"]) for line in run.metrics.read()],
        "ledger": [(entry.step, entry.prompt_ids) for entry in run.ledger.entries()],
        "checkpoints": run.checkpoints.steps(),
        "samples": sorted(os.listdir(run.samples)),
        "files": sorted(name for name in os.listdir(path) if ".void." not in name),
    }


def test_a_run_killed_at_any_line_and_started_again_ends_as_if_it_had_never_been_killed(
    tmp_path: Path, crash_everywhere: CrashEverywhere
) -> None:
    train(tmp_path / "undisturbed")
    expected = outcome(tmp_path / "undisturbed")
    assert [step for step, _ in expected["metrics"]] == [1, 2, 3, 4, 5, 6]
    path = tmp_path / "killed" / "run"
    path.parent.mkdir()
    lost: list[int] = []

    def observe() -> dict[str, Any]:
        committed = max(RunDirectory(path).checkpoints.steps(), default=0)
        lost.append(len(RunDirectory(path).metrics.read()) - committed)
        train(path)
        return outcome(path)

    seen = crash_everywhere(path.parent, lambda: train(path), observe, [directory, ledger, checkpoints, jsonl, atomic])
    assert len(seen) > 50
    different = {number: after for number, after in enumerate(seen) if after != expected}
    assert different == {}
    assert max(lost) <= EVERY, "at most one checkpoint interval is lost"
    assert max(lost) > 0, "no crash ever lost anything: the test did not reach between two checkpoints"


def test_a_run_that_exists_is_refused_with_the_way_on(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        RequestError, match=r"exists \(its last checkpoint is of step 6\): continue it with `rlhf-ray resume"
    ):
        RunDirectory.create(tmp_path / "run", "kind: sft\n")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_has_finished_is_refused_with_the_way_to_train_it_further(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", CONFIG)
    run.write_summary(Summary())
    run.release()
    with pytest.raises(RequestError, match=r"run has finished: train it further with .* and more steps or epochs"):
        RunDirectory.create(tmp_path / "run", CONFIG)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RequestError, match=r"is not a run \(it holds thesis\.tex\)"):
        RunDirectory.create(tmp_path, CONFIG)
    with pytest.raises(RequestError, match=r"is not a run directory: it has no config\.yaml"):
        RunDirectory.resume(tmp_path)
    with pytest.raises(RequestError, match="is not a run directory"):
        RunDirectory.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_what_came_after_the_checkpoint_is_void_on_resume(tmp_path: Path) -> None:
    train(tmp_path, steps=3)
    run, checkpoint = RunDirectory.resume(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2
    assert [line["step"] for line in run.metrics.read()] == [1, 2]
    assert [line["step"] for line in JsonLines(tmp_path / "metrics.void.jsonl").read()] == [3]
    assert [entry.step for entry in run.ledger.entries()] == [1, 2]
    assert sorted(os.listdir(run.samples)) == ["step-000001.jsonl", "step-000002.jsonl"]
    run.ledger.append(3, [1])
    assert [entry.attempt for entry in run.ledger.entries()] == [1, 1, 2]
    assert [(line["attempt"], line["from_step"]) for line in run.attempts.read()] == [(1, 0), (2, 2)]


def test_a_damaged_newest_checkpoint_costs_one_interval_more(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    weights = tmp_path / "checkpoints" / "step-000004" / "weights"
    weights.write_bytes(weights.read_bytes()[::-1])
    train(tmp_path, steps=4)
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == b"01234"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002", "step-000004", "step-000004.bad"]
    assert [line["step"] for line in RunDirectory.open(tmp_path).metrics.read()] == [1, 2, 3, 4]


def test_one_process_at_a_time_owns_a_run_and_a_dead_one_owns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    script = (
        "import sys, time; from rlhf_ray.runs import RunDirectory; RunDirectory.create(sys.argv[1], 'kind: ppo\\n'); "
        "print('owned', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[2])}
    owner = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, env=environment)
    assert owner.stdout is not None and owner.stdout.readline() == b"owned\n"
    try:
        with pytest.raises(RequestError, match=f"is in use by process {owner.pid} on "):
            RunDirectory.resume(path)
        assert RunDirectory.open(path).is_owned()
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
        owner.stdout.close()
    assert not RunDirectory.open(path).is_owned()
    run, checkpoint = RunDirectory.resume(path)
    assert checkpoint is None
    assert run.attempt == 2


def test_a_lock_that_its_owner_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is refused removes the run; another one may have opened the lock before, and takes it after."""
    take = directory.take

    def take_late(lock: int) -> bool:
        monkeypatch.setattr(directory, "take", take)
        (tmp_path / "run/.lock").unlink()
        return take(lock)

    monkeypatch.setattr(directory, "take", take_late)
    run = RunDirectory.create(tmp_path / "run", "kind: sft\n")
    assert run.is_owned() and is_taken(tmp_path / "run/.lock")
    run.release()


def test_the_report_needs_the_files_only_and_shows_what_they_hold(tmp_path: Path) -> None:
    train(tmp_path / "demo")
    run = RunDirectory.open(tmp_path / "demo")
    run.write_summary(
        Summary(
            figures=(Figure("Gold win rate", "0.86"),),
            closing=Table(("figure", "SFT", "PPO"), (("gold", "0.5", "0.8"),)),
            samples=(Sample("a prompt", (Answer("SFT", "an <answer>", {"gold": 0.5}),)),),
            checks=(Check("the first ratio is 1", "1", "exactly 1", True),),
        )
    )
    assert RunDirectory.open(tmp_path / "demo").summary() == run.summary()
    page = write_report([run]).read_text()
    assert run.report_path.read_text() == page
    for text in ("<h1>demo</h1>", "kind ppo", "steps 6", "0.86", "an &lt;answer&gt;", "exactly 1", "reward/mean"):
        assert text in page
    shutil.copytree(tmp_path / "demo", tmp_path / "other")
    both = write_report([run, RunDirectory.open(tmp_path / "other")], tmp_path / "both.html").read_text()
    assert "<h1>demo and other</h1>" in both
