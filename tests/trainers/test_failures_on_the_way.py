"""What fails between two steps costs none of those before it: they are committed, and the resumed run ends in the same bits.

``checkpoint.every_steps`` is 0 throughout, so that nothing but the failure makes the run commit.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.groups import Group
from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.errors import (
    EXIT_RESUMABLE,
    GroupError,
    NumericalError,
    RequestError,
    ResumableStop,
    RlhfRayError,
    ScoringError,
    StorageError,
)
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.runs import reporting
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.ppo.evaluation import PpoEvaluation
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.sampling import FixedSampling
from rlhf_ray.trainers.supervised import loop, sft
from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs
from tests.trainers.small_runs import ask_to_stop, config_of, forget_the_stop, signals_as_before, train

pytestmark = pytest.mark.early


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


def before(patch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], None], call: int = 1) -> None:
    """Do ``act`` before one call of this name."""
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            act()
        return original(*arguments, **options)

    patch.setattr(owner, name, counted)


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


EVERY = "evaluation.every_steps=1"
AWAY, GONE, WRONG = ScoringError("the judge is away"), GroupError("rollout", 0, "generate", "died"), ValueError("wrong")
CASES: dict[str, tuple[str, list[str], tuple[Any, str, Callable[[], None], int], type[BaseException]]] = {
    # Scored are the prompts of the self-check, those of the start's evaluation, and those of two steps.
    "source": ("ppo", [], (Experience, "score_trajectories", raising(AWAY), 4), ResumableStop),
    "mistake in a source": ("ppo", [], (Experience, "score_trajectories", raising(RequestError("no list")), 4), RequestError),
    "rollout": ("ppo", [], (FixedSampling, "collect", raising(GONE), 2), GroupError),
    "publication": ("ppo", [], (Publisher, "publish", raising(GONE), 2), GroupError),
    "metrics on a full disk": ("ppo", [], (Journal, "log_step", raising(StorageError("disk full")), 1), StorageError),
    "source in an evaluation": ("ppo", [EVERY], (PpoEvaluation, "compare", raising(AWAY), 1), ResumableStop),
    "evaluation": ("ppo", [EVERY], (PpoEvaluation, "compare", raising(WRONG), 1), ValueError),
    "stop in an evaluation": ("ppo", [EVERY], (PpoEvaluation, "compare", ask_to_stop, 1), ResumableStop),
    "batch": ("sft", [], (loop, "schedule_update", raising(WRONG), 2), ValueError),
    "evaluation of sft": ("sft", [EVERY], (sft, "evaluate", raising(WRONG), 1), ValueError),
    "evaluation of pairs": ("rm", [EVERY], (HeldOutPairs, "figures", raising(WRONG), 1), ValueError),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``final/`` of the run of a kind that nothing disturbs."""
    finals: dict[str, Path] = {}

    def final(kind: str) -> Path:
        if kind not in finals:
            finals[kind] = train(config_of(kind, tmp_path_factory.mktemp(kind))).final
        return finals[kind]

    return final


@pytest.mark.parametrize("name", CASES)
def test_the_steps_before_a_failure_are_committed(
    name: str, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, overrides, (owner, method, act, call), error = CASES[name]
    expected = load_file(whole(kind) / "model.safetensors")
    config = config_of(kind, tmp_path, "checkpoint.every_steps=0", *overrides)
    run = RunDirectory(tmp_path / "late")
    with monkeypatch.context() as patch:
        before(patch, owner, method, act, call)
        with pytest.raises(error) as caught:
            train(config)
    if error is ResumableStop:
        assert isinstance(caught.value, RlhfRayError) and caught.value.exit_code == EXIT_RESUMABLE
        assert f"rlhf-ray resume {run.path}" in str(caught.value)
    assert run.checkpoints.steps() == [1], "the first of two steps"
    assert not run.final.exists() and reporting.status(run)["state"].startswith("stopped")

    forget_the_stop()
    continue_run(str(run.path), place=ThisProcess(config.cluster))
    weights = load_file(run.final / "model.safetensors")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert run.checkpoints.steps() == [1], "0 keeps the commit of no other step once the run has finished"


@pytest.mark.parametrize(("kind", "length"), [("ppo", "steps=5"), ("sft", "epochs=1.5")])
def test_what_was_learned_before_updates_that_are_skipped_is_committed_once(
    kind: str, length: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(kind, tmp_path, "checkpoint.every_steps=0", "run.max_consecutive_skips=2", length)
    applied, apply = [], Group.apply

    def first_alone(self: Group, skip: bool, *limit: float) -> Any:
        if not skip:  # the self-check at the start skips one
            applied.append(skip)
        return apply(self, skip or len(applied) > 1, *limit)

    monkeypatch.setattr(Group, "apply", first_alone)
    with pytest.raises(NumericalError, match="2 updates in a row had NaN or Inf"):
        train(config)
    run = RunDirectory(tmp_path / "late")
    assert run.checkpoints.steps() == [3], "the first update, and two that changed nothing"
    with pytest.raises(NumericalError, match="3 updates in a row"):
        continue_run(str(run.path), place=ThisProcess(config.cluster))
    assert run.checkpoints.steps() == [3], "what changed nothing takes the place of no earlier commit"


@pytest.mark.parametrize("kind", ["ppo", "sft"])
def test_a_stop_that_meets_a_checkpoint_that_is_due_ends_with_75(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, Checkpointer, "save", ask_to_stop)
    with pytest.raises(ResumableStop, match=r"stopped on request after (step|update) 1 of 2; go on with"):
        train(config_of(kind, tmp_path, "checkpoint.every_steps=1"))
    assert RunDirectory(tmp_path / "late").checkpoints.steps() == [1]


@pytest.mark.parametrize(("owner", "method"), [(PpoEvaluation, "measure_start"), (Experience, "score")])
def test_a_stop_before_the_first_step_is_obeyed_at_once(
    owner: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, owner, method, ask_to_stop)
    with pytest.raises(ResumableStop, match="before the first step"):
        train(config_of("ppo", tmp_path))
    assert RunDirectory(tmp_path / "late").ledger.last_step == 0


def test_a_source_that_never_worked_is_an_error_and_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, Experience, "score_trajectories", raising(AWAY), 3)
    with pytest.raises(ScoringError, match="the judge is away"):
        train(config_of("ppo", tmp_path))
    assert RunDirectory(tmp_path / "late").checkpoints.steps() == []


def test_a_last_commit_that_fails_does_not_keep_final_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointer, "save", lambda *_: raising(StorageError("disk full"))())
    with pytest.raises(StorageError, match="disk full"):
        train(config_of("sft", tmp_path, "epochs=0.2"))
    assert RunDirectory(tmp_path / "late").final_step(whole=True) == 1


def test_a_run_that_wants_no_commits_needs_no_space_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    before(monkeypatch, Checkpointer, "save", ask_to_stop)  # a commit of the first step, which stays
    with pytest.raises(ResumableStop):
        train(config := config_of("sft", tmp_path, "checkpoint.every_steps=1"))
    forget_the_stop()
    monkeypatch.undo()
    monkeypatch.setattr(Checkpointer, "save", lambda *_: raising(StorageError("disk full"))())
    continue_run(str(tmp_path / "late"), ["checkpoint.every_steps=0"], place=ThisProcess(config.cluster))
    run = RunDirectory(tmp_path / "late")
    assert run.is_finished and run.final_step(whole=True) == 2 and run.checkpoints.steps() == [1]
    assert "the last step could not be committed" in project_log.getvalue()


def test_samples_that_cannot_be_written_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(RunDirectory, "write_samples", lambda *_: raising(StorageError("disk full"))())
    run = train(config_of("ppo", tmp_path))
    assert run.final_step(whole=True) == 2 and run.is_finished
    said = project_log.getvalue()
    assert said.count("could not be written (disk full)") == 1 and "the samples of 2 steps could not be written" in said
