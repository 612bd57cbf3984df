"""Runs of each kind whose groups and engines fail while they load: the same attempt goes on, to the same bits.

DeepSpeed, the transformers engine and the files are real; only the death of a rank is an object that is gone.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.workers.critic import CriticWorker
from rlhf_ray.errors import GroupError, ModelLoadError
from rlhf_ray.runs.directory import RunDirectory
from tests.faults.verdict import ledger_differences, weight_differences
from tests.trainers.recovery.failing_place import Fault, Script, config_of_every_role, train_kind_with, train_with

pytestmark = pytest.mark.early
SHORT = ["steps=1", "evaluation.every_steps=0"]
FIRST: dict[tuple[str, str], Fault] = {
    ("policy", "setup"): "dies before", ("critic", "setup"): "raises after", ("reference", "setup"): "dies after",
    ("reward", "setup"): "raises before", ("rollout", "setup"): "dies before", ("policy", "save_without_weights"): "dies after",
    ("critic", "vocabulary"): "dies before", ("reward", "describe"): "raises before", ("policy", "execution"): "raises before",
}  # fmt: skip
SECOND: dict[tuple[str, str], Fault] = {
    ("policy", "setup"): "raises after", ("critic", "setup"): "dies before", ("reward", "setup"): "dies after",
    ("rollout", "setup"): "raises after", ("reference", "vocabulary"): "dies after",
}  # fmt: skip


def once(faults: dict[tuple[str, str], Fault]) -> Script:
    """Each fault at the first such call."""
    left = dict(faults)
    return Script(lambda role, method, number: left.pop((role, method), None), fails_to_load=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nothing disturbs."""
    return train_with(config_of_every_role(tmp_path_factory.mktemp("whole"), *SHORT), Script())[0]


@pytest.mark.parametrize("faults", [FIRST, SECOND], ids=["first", "second"])
def test_ppo_goes_on_in_place_over_losses_of_every_role_while_it_starts(
    faults: dict[tuple[str, str], Fault], whole: RunDirectory, tmp_path: Path
) -> None:
    script = once(faults)
    run, place = train_with(config_of_every_role(tmp_path, *SHORT), script)
    assert {(role, method): fault for role, method, fault in script.failed} == faults
    assert len(run.attempts.read()) == 1
    assert weight_differences(run.path, whole.path) == [] and ledger_differences(run.path, whole.path) == []
    kept = run.incidents.read()
    assert sorted((one.role, one.fault) for one in kept) == sorted(
        (role, "died" if fault.startswith("dies") else "error") for (role, _), fault in faults.items()
    )
    assert {(one.phase, one.action, one.step, one.lost_steps) for one in kept} == {("start", "restarted", 0, 0)}
    restarts = {role: len(workers) - 1 for role, workers in place.workers.items()}
    assert restarts == {role: sum(one == role for one, _ in faults) for role in restarts}, "others keep their processes"


def test_what_a_rank_refuses_ends_the_run_at_once_and_the_same_error_after_one_more_try(tmp_path: Path) -> None:
    def refuse(worker: CriticWorker, setup: object) -> None:
        raise ModelLoadError("MODEL has no weights: name another one")

    with mock.patch.object(CriticWorker, "_load", refuse), pytest.raises(ModelLoadError, match="name another one"):
        train_with(config_of_every_role(tmp_path, *SHORT), script := Script(fails_to_load=True))
    assert script.calls.count(("critic", "setup")) == 1

    def fail(worker: CriticWorker, setup: object) -> None:
        raise torch.OutOfMemoryError(f"Tried to allocate {script.calls.count(('critic', 'setup'))} GiB")

    script = Script(fails_to_load=True)
    with mock.patch.object(CriticWorker, "_load", fail), pytest.raises(GroupError, match="Tried to allocate 2 GiB"):
        train_with(config_of_every_role(tmp_path / "again", *SHORT), script)
    assert script.calls.count(("critic", "setup")) == 2
    kept = RunDirectory(tmp_path / "again" / "late").incidents.read()
    assert [(one.role, one.action) for one in kept] == [("critic", "stopped")] * 2


SFT: dict[tuple[str, str], Fault] = {("policy", "setup"): "dies after"}
RM: dict[tuple[str, str], Fault] = {("reward", "setup"): "raises after", ("reward", "compute_shape"): "dies before"}


@pytest.mark.parametrize(("kind", "faults"), [("sft", SFT), pytest.param("rm", RM, marks=pytest.mark.long)])
def test_supervised_training_goes_on_in_place_over_losses_while_it_starts(
    kind: str, faults: dict[tuple[str, str], Fault], tmp_path: Path
) -> None:
    expected, _ = train_kind_with(kind, tmp_path, Script(), "run.name=whole")
    ((role, _), *_) = faults
    script = once(faults)
    run, place = train_kind_with(kind, tmp_path, script)
    assert len(run.attempts.read()) == 1 and len(place.workers[role]) == len(script.failed) + 1
    assert [(one.role, one.phase) for one in run.incidents.read()] == [(role, "start")] * len(script.failed)
    weights, others = (load_file(one.final / "model.safetensors") for one in (run, expected))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    first = run.metrics.read()[0]
    assert first["time/step"] < first["timestamp"] - run.attempts.read()[0]["timestamp"], "the start is in no update"


def test_losses_at_the_start_and_in_the_first_step_are_one_budget(tmp_path: Path) -> None:
    script = once({("critic", "setup"): "dies before", ("critic", "apply"): "dies before"})
    with pytest.raises(GroupError, match="critic rank 0 failed in apply"):
        train_with(config_of_every_role(tmp_path, *SHORT, "run.max_group_restarts=1"), script)
    assert len(script.failed) == 2
