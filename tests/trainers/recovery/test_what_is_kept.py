"""What a run keeps that a loss ends, or that is asked to stop while it comes back; ranks fail as in ``failing_place``."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.errors import DeadlineError, GroupError, ResumableStop, RlhfRayError, StorageError
from rlhf_ray.runs.directory import RunDirectory
from tests.trainers.recovery.failing_place import Fault, Script, config_of_every_role, train_kind_with, train_with
from tests.trainers.small_runs import ask_to_stop

pytestmark = pytest.mark.early
RARE = ["checkpoint.every_steps=100", "evaluation.every_steps=0"]


def test_an_update_that_was_made_is_not_made_again_where_its_evaluation_fails_and_is_kept_where_that_ends_the_run(
    tmp_path: Path,
) -> None:
    def when(role: str, method: str, number: int) -> Fault | None:
        made = script.calls.count((role, "apply"))
        return "raises before" if made and method not in ("accumulate", "apply") and not saves(method) else None

    script = Script(when)
    settings = ["run.max_group_restarts=1", "checkpoint.every_steps=100", "evaluation.every_steps=1"]
    with pytest.raises(GroupError, match="the test says that it raises before"):
        train_kind_with("sft", tmp_path, script, *settings)
    run = RunDirectory.open(tmp_path / "late")
    assert [method for _, method in script.calls].count("apply") == 1
    assert run.checkpoints.steps() == [1]
    # The first loss has the update committed, after which losses are counted anew.
    assert [(one.action, one.step, one.back_to) for one in run.incidents.read()] == [
        ("restarted", 1, 1), ("restarted", 1, 1), ("stopped", 1, 1),
    ]  # fmt: skip


def saves(method: str) -> bool:
    """Whether a method has to do with checkpoints."""
    return "save" in method or method in ("load", "setup")


def test_a_stop_that_meets_the_loss_of_what_does_not_learn_commits_and_says_so(tmp_path: Path) -> None:
    def when(role: str, method: str, number: int) -> Fault | None:
        """In the third step; a step has two updates."""
        if (role, method) != ("reference", "log_probs") or script.calls.count(("policy", "apply")) < 5 or script.failed:
            return None
        ask_to_stop()
        return "dies before"

    script = Script(when)
    with pytest.raises(ResumableStop, match="stopped on request after step 2 of 3"):
        train_with(config_of_every_role(tmp_path, *RARE, "run.stop_grace_s=1000"), script)
    run = RunDirectory.open(tmp_path / "late")
    (incident,) = run.incidents.read()
    assert (incident.step, incident.action, incident.back_to, incident.lost_steps) == (2, "stopped", 2, 0)
    assert run.checkpoints.steps() == [2]


def test_a_run_that_could_only_evaluate_earlier_weights_does_not_count_as_finished(tmp_path: Path) -> None:
    def when(role: str, method: str, number: int) -> Fault | None:
        tries = script.calls.count(("policy", "begin_save"))
        if (role, method) != ("policy", "begin_save"):
            return None
        if tries == 1:
            raise StorageError("the disk is full")
        return "dies before" if tries == 2 else None

    script = Script(when)
    settings = ["checkpoint.every_steps=0", "evaluation.every_steps=0", "steps=2"]
    with pytest.raises(RlhfRayError, match="the last step is not committed, and only step 0 could be evaluated"):
        train_with(config_of_every_role(tmp_path, *settings), script)
    run = RunDirectory.open(tmp_path / "late")
    assert not run.is_finished and run.final_step() == 2
    assert [line["step"] for line in run.metrics.read() if line["step"]] == [1, 2]


def test_a_reward_model_in_training_that_missed_a_deadline_begins_anew_where_nothing_is_committed(
    tmp_path: Path,
) -> None:
    late = list[int]()

    def when(role: str, method: str, number: int) -> Fault | None:
        if method == "accumulate" and [one for _, one in script.calls].count("accumulate") == 2 and not late:
            late.append(number)
            raise DeadlineError(role, 0, method, "ranks [0] did not answer within 1 s")
        return None

    script = Script(when)
    run, place = train_kind_with("rm", tmp_path, script, *RARE)
    assert late and [(one.fault, one.back_to) for one in run.incidents.read()] == [("deadline", 0)]
    assert [len(workers) for workers in place.workers.values()] == [2]
