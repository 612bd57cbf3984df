"""PPO over the loss of groups at every call of every role: the run ends in the same bits, and uses each prompt once.

DeepSpeed, the transformers engine and the files are real; only the death of a rank is an object that is gone. So hundreds of
points take seconds. The same on Ray, with processes that are killed, is in ``tests/faults/groups.py``.
"""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.workers.critic import CriticWorker
from rlhf_ray.errors import GroupError, ResumableStop, StorageError
from rlhf_ray.runs.directory import RunDirectory
from tests.trainers.recovery.failing_place import Fault, Script, config_of_every_role, train_kind_with, train_with
from tests.trainers.small_runs import ask_to_stop

pytestmark = pytest.mark.early
FAULTS = get_args(Fault)
LEARNED = ("reward/", "kl/", "loss/", "evaluation/", "length/", "grad_norm/", "update", "weights/version")


def results(run: RunDirectory) -> dict[str, Any]:
    """All that must not depend on what was lost on the way."""
    weights = {place: load_file(run.final / place / "model.safetensors") for place in ("", "critic")}
    ledger = [(entry.step, entry.prompt_ids) for entry in run.ledger.entries()]
    lines = [
        {name: value for name, value in line.items() if name == "step" or name.startswith(LEARNED)}
        for line in run.metrics.read()
    ]
    return {"weights": weights, "ledger": ledger, "metrics": lines}


def assert_same(run: RunDirectory, expected: dict[str, Any], about: object) -> None:
    found = results(run)
    assert found["ledger"] == expected["ledger"], about
    assert found["metrics"] == expected["metrics"], about
    for place, tensors in expected["weights"].items():
        differing = [name for name in tensors if not torch.equal(tensors[name], found["weights"][place][name])]
        assert not differing, (about, place, differing)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What the run that nothing disturbs ends in, and its calls."""
    script = Script()
    run, _ = train_with(config_of_every_role(tmp_path_factory.mktemp("whole")), script)
    return results(run), script.calls


@pytest.mark.parametrize("every", [1, *(pytest.param(every, marks=pytest.mark.long) for every in (2, 0))])
def test_a_loss_at_every_call_changes_no_bit(
    every: int, undisturbed: tuple[dict[str, Any], list[tuple[str, str]]], tmp_path: Path
) -> None:
    expected, _ = undisturbed
    rng, seen = random.Random(every), set[tuple[str, str, Fault]]()
    wanted = list(FAULTS)

    def when(role: str, method: str, number: int) -> Fault | None:
        """Each fault once at each method of each role; the calls between two faults go well."""
        if rng.random() < 0.6:
            return None
        rng.shuffle(wanted)
        for fault in wanted:
            if (role, method, fault) not in seen:
                seen.add((role, method, fault))
                return fault
        return None

    script = Script(when)
    config = config_of_every_role(tmp_path, f"checkpoint.every_steps={every}", "steps=3")
    run, place = train_with(config, script)
    assert_same(run, expected, script.failed)
    assert {role for role, *_ in script.failed} == {"policy", "critic", "reference", "reward"}
    assert len(script.failed) >= 20
    incidents = run.incidents.read()
    assert sum(len(workers) - 1 for workers in place.workers.values()) >= len(incidents) > 0
    assert all(incident.action in ("restarted", "rolled_back") for incident in incidents)
    assert len(run.attempts.read()) == 1


def test_a_group_that_lives_keeps_its_processes(
    undisturbed: tuple[dict[str, Any], list[tuple[str, str]]], tmp_path: Path
) -> None:
    expected, calls = undisturbed
    late = [number for number, call in enumerate(calls) if call == ("critic", "apply")][2]
    script = Script(lambda role, method, number: "dies before" if number == late else None)
    run, place = train_with(config_of_every_role(tmp_path, "checkpoint.background=false"), script)
    assert script.failed == [("critic", "apply", "dies before")]
    assert {role: len(workers) for role, workers in place.workers.items() if role != "rollout"} == {
        "policy": 1, "critic": 2, "reference": 1, "reward": 1,
    }  # fmt: skip
    assert_same(run, expected, script.failed)
    (incident,) = run.incidents.read()
    assert (incident.step, incident.back_to, incident.lost_steps, incident.fault) == (1, 1, 0, "died")


@pytest.mark.parametrize(("every", "back_to"), [(1, 1), (2, 0), pytest.param(0, 0, marks=pytest.mark.long)])
def test_the_loss_of_what_learns_costs_what_came_after_the_last_commit(
    every: int, back_to: int, undisturbed: tuple[dict[str, Any], list[tuple[str, str]]], tmp_path: Path
) -> None:
    def when(role: str, method: str, number: int) -> Fault | None:
        """In the second step: the values before are those of the self-check, the start's evaluation, and the first step."""
        is_it = (role, method) == ("critic", "values") and script.calls.count(("critic", "values")) == 4
        return "dies before" if is_it and not script.failed else None

    script = Script(when)
    commits = [
        f"checkpoint.every_steps={every}",
        "checkpoint.background=false",
    ]  # else the loss may come before it is written
    run, place = train_with(config_of_every_role(tmp_path, *commits), script)
    (incident,) = run.incidents.read()
    assert (incident.step, incident.back_to, incident.lost_steps) == (1, back_to, 1 - back_to)
    assert incident.action == ("restarted" if back_to else "rolled_back")
    # Only its files have the beginning, so the policy starts again too.
    assert [len(place.workers[role]) for role in ("policy", "critic", "reference")] == [1 if back_to else 2, 2, 1]
    voided = run.path / "metrics.void.jsonl"
    assert voided.exists() == (back_to == 0)
    assert_same(run, undisturbed[0], every)


def test_a_group_that_fails_again_and_again_between_two_commits_ends_the_run_with_the_last(tmp_path: Path) -> None:
    def when(role: str, method: str, number: int) -> Fault | None:
        """Once in the first step, and in the second, after the commit of the first, always."""
        if (role, method) != ("critic", "apply") or script.calls.count(("critic", "apply")) in (2, 3):
            return None
        return "raises before"

    script = Script(when)
    limits = ["run.max_group_restarts=1", "checkpoint.background=false"]
    with pytest.raises(GroupError, match="critic rank 0 failed in apply"):
        train_with(config_of_every_role(tmp_path, *limits), script)
    run = RunDirectory(tmp_path / "late")
    assert len(script.failed) == 3 and run.checkpoints.steps() == [1]
    assert [one.action for one in run.incidents.read()] == ["restarted", "restarted", "stopped"]
    assert [one.step for one in run.incidents.read()] == [0, 1, 1]


def test_with_no_restarts_the_first_loss_ends_the_run(tmp_path: Path) -> None:
    script = Script(lambda role, method, number: "dies before" if role == "reference" and number > 20 else None)
    with pytest.raises(GroupError, match="reference rank 0 failed in log_probs"):
        train_with(config_of_every_role(tmp_path, "run.max_group_restarts=0"), script)
    assert len(script.failed) == 1


def test_a_run_that_is_to_stop_does_not_wait_for_a_restart(tmp_path: Path) -> None:
    def when(role: str, method: str, number: int) -> Fault | None:
        if (role, method) != ("critic", "apply") or script.calls.count(("critic", "apply")) < 3:
            return None
        ask_to_stop()
        return "dies before"

    script = Script(when)
    with pytest.raises(ResumableStop, match="stopped on request after step 1 of 3"):
        train_with(config_of_every_role(tmp_path, "checkpoint.background=false"), script)
    run = RunDirectory(tmp_path / "late")
    assert run.checkpoints.steps() == [1] and [one.action for one in run.incidents.read()] == ["stopped"]


@pytest.mark.parametrize("zero", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (2, 3))])
def test_a_group_that_lives_takes_up_a_commit_at_every_zero_stage(zero: int, tmp_path: Path) -> None:
    stages = [f"policy.engine.zero={zero}", f"critic.engine.zero={zero}", "steps=2", "evaluation.every_steps=0"]
    (tmp_path / "whole").mkdir()
    whole, _ = train_with(config_of_every_role(tmp_path / "whole", *stages), Script())

    def when(role: str, method: str, number: int) -> Fault | None:
        """The critic dies after gradients of the second step were added up, in the policy too, and again after its update."""
        late = (role, method) in (("critic", "accumulate"), ("critic", "apply")) and script.calls.count(
            ("critic", method)
        ) == 4
        return "dies after" if late and method not in {each[1] for each in script.failed} else None

    script = Script(when)
    run, place = train_with(config_of_every_role(tmp_path, *stages), script)
    assert [method for _, method, _ in script.failed] == ["accumulate", "apply"]
    assert len(place.workers["policy"]) == 1, (
        "it lives, with gradients, an update and moments that must be as if never there"
    )
    assert_same(run, results(whole), zero)


@pytest.mark.parametrize("mode", ["one_step_off", pytest.param("windowed", marks=pytest.mark.long)])
def test_samples_that_are_there_are_not_lost_and_each_prompt_is_used_once(mode: str, tmp_path: Path) -> None:
    settings = [f"rollout.mode={mode}", "steps=4", "checkpoint.every_steps=2", "evaluation.every_steps=0"]
    settings += ["run.deterministic=false"] * (mode == "windowed")
    (tmp_path / "whole").mkdir()
    whole, _ = train_with(config_of_every_role(tmp_path / "whole", *settings), Script())
    wanted = {("reference", "log_probs"): 4, ("critic", "apply"): 7}

    def when(role: str, method: str, number: int) -> Fault | None:
        due = script.calls.count((role, method)) == wanted.get((role, method))
        return "dies before" if due and (role, method, "dies before") not in script.failed else None

    script = Script(when)
    run, _ = train_with(config_of_every_role(tmp_path, *settings), script)
    assert len(script.failed) == 2
    first, second = run.incidents.read()
    assert (first.role, first.lost_steps, second.role) == ("reference", 0, "critic") and second.back_to in (2, 3)
    if mode == "one_step_off":
        assert_same(run, results(whole), mode)
    else:  # what is sampled when is a matter of time
        assert [entry.prompt_ids for entry in run.ledger.entries()] == [e.prompt_ids for e in whole.ledger.entries()]


@pytest.mark.parametrize("kind", ["sft", pytest.param("rm", marks=pytest.mark.long)])
def test_supervised_training_goes_on_from_its_last_commit_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    settings = ["evaluation.every_steps=1", "checkpoint.every_steps=1"]
    (tmp_path / "whole").mkdir()
    whole, _ = train_kind_with(kind, tmp_path / "whole", undisturbed := Script(), *settings)
    changing = ("accumulate", "apply", "begin_save", "saved")
    left = [(method, fault) for method in changing for fault in FAULTS]
    random.Random(kind).shuffle(left)

    def when(role: str, method: str, number: int) -> Fault | None:
        """Each fault once at each method that changes something, and at no two calls in a row."""
        due = [fault for one, fault in left if one == method]
        if not due or (script.failed and number < script.failed_at + 3):
            return None
        left.remove((method, due[0]))
        script.failed_at = number
        return due[0]

    script = Script(when)
    run, place = train_kind_with(kind, tmp_path, script, *settings)
    expected, found = (load_file(one.final / "model.safetensors") for one in (whole, run))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {method for _, method, _ in script.failed} == set(changing), (left, undisturbed.calls)
    figures = [
        [{name: value for name, value in line.items() if name.startswith(LEARNED)} for line in one.metrics.read()]
        for one in (whole, run)
    ]
    assert figures[0] == figures[1]
    restarts = len(next(iter(place.workers.values()))) - 1
    # One that fails once more while what is finished is committed starts again once.
    assert len(script.failed) >= restarts == len(run.incidents.read()) > 0


def test_what_a_lost_rank_still_writes_is_in_no_checkpoint(tmp_path: Path) -> None:
    """The first critic lives on, cut off, and writes into the directory of the save in which it was lost, after the next."""
    written: list[Path] = []

    def when(role: str, method: str, number: int) -> Fault | None:
        return "dies after" if (role, method) == ("critic", "begin_save") and not script.failed else None

    script = Script(when)
    save = CriticWorker.begin_save

    def note(worker: CriticWorker, directory: str) -> None:
        written.append(Path(directory))
        save(worker, directory)

    with mock.patch.object(CriticWorker, "begin_save", note):
        run, place = train_with(config_of_every_role(tmp_path, "checkpoint.every_steps=1"), script)
    lost, living = place.workers["critic"][:2]
    assert lost is not living and len(set(written)) == len(written) == 4, (
        "each attempt at a commit has a directory of its own"
    )
    before = {path: path.read_bytes() for path in run.checkpoints.directory.rglob("*") if path.is_file()}
    with suppress(StorageError):  # of a write that it had begun, whose directory is gone
        lost.saved()
    lost.save(str(written[0]))
    assert {path: path.read_bytes() for path in before} == before
    newest = run.checkpoints.latest_valid()
    assert newest is not None and newest.step == run.checkpoints.steps()[-1] == 3
