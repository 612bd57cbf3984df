"""However a resume with changes is killed, what the run goes on with is on record, and the same command does the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import CapacityError, RequestError
from rlhf_ray.launch import parent
from rlhf_ray.monitoring.report.summary import Summary
from rlhf_ray.runs import directory, record, resuming
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.inputs import fingerprint_inputs
from rlhf_ray.runs.record import Record, read_record, write_record
from rlhf_ray.runs.resuming import resume_run
from rlhf_ray.storage import atomic, jsonl

CrashEverywhere = Callable[[Path, Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]
STATE = {"progress": {"update": 2, "examples": 8, "consecutive_skips": 0}, "order": {"parts": [[8, 8]], "taken": 8}}
CHANGE = {"key": "epochs", "from": 1.0, "to": 2.0}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run of two updates, with a commit of the last one."""
    config = load_config("demo-sft", [f"run.root={tmp_path}", "run.name=run", "epochs=1.0"]).to_train()
    run = RunDirectory.create(tmp_path / "run", dump_config(config))
    write_record(run.inputs_path, Record(dump_config(config), fingerprint_inputs(config)))
    pending = run.checkpoints.begin(2)
    (pending.path / "weights").write_text("w")
    run.checkpoints.commit(pending, about={"state": STATE})
    run.metrics.append({"step": 2, "timestamp": 1e9})
    run.write_summary(Summary())
    run.release()
    return run.path


def go_on(path: Path, *overrides: str) -> None:
    resumed = resume_run(path, overrides)
    if resumed is not None:
        resumed.run.release()


def state(path: Path) -> tuple[float, float, bool, bool]:
    """Epochs in the config and as the run knows them, whether the change is on record, and whether the run has finished."""
    run = RunDirectory.open(path)
    known = read_record(run.inputs_path)
    assert known is not None
    on_record = any(CHANGE in line.get("changes", []) for line in run.attempts.read())
    return (
        load_config(run.config_path).epochs,
        float(known.config.partition("epochs: ")[2].split()[0]),
        on_record,
        run.is_finished,
    )


def test_a_resume_with_a_change_that_is_killed_anywhere_is_done_by_the_same_command_again(
    finished: Path, crash_everywhere: CrashEverywhere
) -> None:
    killed: list[tuple[float, float, bool, bool]] = []

    def observe() -> tuple[float, float, bool, bool]:
        killed.append(state(finished))
        go_on(finished, "epochs=2.0")
        return state(finished)

    modules = [directory, record, resuming, jsonl, atomic]
    seen = crash_everywhere(finished.parent, lambda: go_on(finished, "epochs=2.0"), observe, modules)
    assert set(seen) == {(2.0, 2.0, True, False)} and len(seen) > 8
    for _, known, on_record, _ in killed:
        assert on_record or known == 1.0, "the run knows no change that is not on record"
    assert len(set(killed)) > 3, "it was killed between the parts of the change"


def test_a_change_that_was_killed_half_way_is_told_to_a_resume_without_it(
    finished: Path, crash_everywhere: CrashEverywhere
) -> None:
    def observe() -> tuple[float, float, bool, bool]:
        go_on(finished)
        return state(finished)

    modules = [directory, record, resuming, jsonl, atomic]
    seen = crash_everywhere(finished.parent, lambda: go_on(finished, "epochs=2.0"), observe, modules)
    assert {(config, known) for config, known, *_ in seen} == {(1.0, 1.0), (2.0, 2.0)}
    assert all(on_record for config, _, on_record, _ in seen if config == 2.0)


def test_a_finished_run_without_a_commit_cannot_become_longer_and_says_what_can(finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(RequestError, match=r"kept no commit .* start a new run whose model begins at .*final"):
        resume_run(finished, ["epochs=2.0"])
    assert RunDirectory.open(finished).is_finished


def test_a_run_whose_ranks_find_no_room_any_more_is_told_how_to_go_on_with_fewer(tmp_path: Path) -> None:
    settings = ["run.name=run", f"run.root={tmp_path}", "policy.ranks=2", "policy.resources.cpus_per_rank=1"]
    config = load_config("demo-sft", settings).to_train()
    run = RunDirectory.create(tmp_path / "run", dump_config(config))
    write_record(run.inputs_path, Record(dump_config(config), fingerprint_inputs(config)))
    pending = run.checkpoints.begin(2)
    (pending.path / "weights").write_text("w")
    run.checkpoints.commit(pending, about={"state": STATE})
    run.release()
    with pytest.raises(CapacityError, match=rf"go on with fewer ranks, .*: rlhf-ray resume {run.path} policy.ranks=1$"):
        parent.resume_run(run.path, ["cluster.num_cpus=1"])
    run.checkpoints.remove(2)
    with pytest.raises(CapacityError, match="the job does not fit") as error:
        parent.resume_run(run.path, ["cluster.num_cpus=1"])
    assert "fewer ranks" not in str(error.value)
