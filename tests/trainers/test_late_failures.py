"""Thirty runs with one failure each after their last step: what was trained is there, and a resume does only what is missing.

The failures come from where real ones do: a full disk, a tracker, the report, a reward source, a rank, an engine, a signal.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.workers.policy import PolicyWorker
from rlhf_ray.errors import ClosingError, GroupError, ResumableStop, RlhfRayError, StorageError
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.runs import reporting
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.jsonl import JsonLines
from rlhf_ray.trackers import starting
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.ppo.evaluation import PpoEvaluation
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trainers.session import Session
from rlhf_ray.trainers.supervised import loop, sft
from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs
from tests.trainers.small_runs import JOBS, STEPS, ask_to_stop, config_of, forget_the_stop, signals_as_before, train

pytestmark = pytest.mark.early


class Late:
    """Knows when everything is learned; from then on ``fails`` raises, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.monkeypatch = monkeypatch
        self.root = root
        self.learned = 0
        self.failed = False
        for owner, name in ((Learner, "learn"), (loop, "run_update")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, learn: Callable[..., Any]) -> Callable[..., Any]:
        def learn_and_count(*arguments: Any, **options: Any) -> Any:
            outcome = learn(*arguments, **options)
            self.learned += 1
            return outcome

        return learn_and_count

    def before(self, owner: Any, name: str, act: Callable[[], None]) -> None:
        """Do ``act`` before the first call of this name after the last step."""
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self.learned >= STEPS and not self.failed:
                self.failed = True
                act()
            return original(*arguments, **options)

        self.monkeypatch.setattr(owner, name, call)

    def fails(self, owner: Any, name: str, error: Exception) -> None:
        def act() -> None:
            raise error

        self.before(owner, name, act)


@dataclass(frozen=True)
class Failure:
    """How to break a run late, and the error that it then ends with; none where it ends well."""

    breaks: Callable[[Late], None]
    ends_with: type[RlhfRayError] | None = None
    says: str = ""


class BrokenSink:
    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == STEPS:
            raise RuntimeError("the tracker is down")

    def again(self) -> None:
        raise RuntimeError("the tracker is down")

    def close(self) -> None:
        raise RuntimeError("the tracker is down")


EVALUATIONS = {
    "ppo": (PpoEvaluation, "compare"),
    "sft": (sft, "evaluate"),
    "dpo": (HeldOutPairs, "figures"),
    "rm": (HeldOutPairs, "figures"),
}


def tracker_fails(late: Late) -> None:
    late.monkeypatch.setattr(Journal, "_exporters", lambda journal: (BrokenSink(), None))
    late.failed = True


def no_process_for_trackers(late: Late) -> None:
    def start(arguments: Sequence[str]) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    late.monkeypatch.setattr(starting, "_start", start)
    late.failed = True


def a_close_fails(late: Late) -> None:
    enter = Session.__enter__

    def enter_and_promise(session: Session) -> Session:
        session.cleanup.callback(lambda: 1 / 0)
        return enter(session)

    late.monkeypatch.setattr(Session, "__enter__", enter_and_promise)
    late.failed = True


def metrics_disk_full(late: Late) -> None:
    late.fails(JsonLines, "append", StorageError("disk full: metrics.jsonl"))


def failures(kind: str) -> dict[str, Failure]:
    evaluation = EVALUATIONS[kind]
    shared = {
        "evaluation": Failure(
            lambda late: late.fails(*evaluation, ValueError("no figures")), ClosingError, "last evaluation.*no figures"
        ),
        "report": Failure(
            lambda late: late.fails(reporting, "render_report", ValueError("no page")), ClosingError, "report.*no page"
        ),
        "summary on a full disk": Failure(
            lambda late: late.fails(RunDirectory, "write_closing", StorageError("disk full")), ClosingError, "disk full"
        ),
        "stop as soon as all is learned": Failure(
            lambda late: late.before(JsonLines, "append", ask_to_stop),
            ResumableStop,
            f"{STEPS} of {STEPS}, before its last",
        ),
        "stop in the evaluation": Failure(lambda late: late.before(*evaluation, ask_to_stop)),
        "tracker": Failure(tracker_fails),
        "no process for trackers": Failure(no_process_for_trackers),
        "closing a connection": Failure(a_close_fails),
    }
    log_evaluation = Failure(
        lambda late: late.fails(Journal, "log_evaluation", StorageError("disk full")), ClosingError, "disk full"
    )
    if kind == "ppo":
        return shared | {
            "reward source": Failure(
                lambda late: late.before(PpoEvaluation, "compare", (late.root / "away").touch), ResumableStop, "away"
            ),
            "engine": Failure(
                lambda late: late.fails(Publisher, "publish", GroupError("rollout", 0, "update", "died")),
                GroupError, "died",
            ),
        }  # fmt: skip
    if kind == "sft":
        # Which ends nothing: the group is started again and loads the last step.
        rank = Failure(lambda late: late.fails(PolicyWorker, "log_probs", RuntimeError("out of memory")))
        return shared | {"rank": rank, "figures on a full disk": log_evaluation}
    return shared | {
        "last metrics on a full disk": Failure(metrics_disk_full, StorageError, "disk full"),
        "page": Failure(lambda late: late.fails(HeldOutPairs, "page", KeyError("pair")), ClosingError, "pair"),
    }


CASES = [(kind, name) for kind in JOBS for name in failures(kind)]
SHORT = {
    ("ppo", "evaluation"), ("ppo", "stop as soon as all is learned"), ("ppo", "reward source"), ("ppo", "engine"),
    ("sft", "evaluation"), ("sft", "report"), ("sft", "no process for trackers"), ("sft", "closing a connection"),
    ("rm", "summary on a full disk"), ("rm", "stop in the evaluation"), ("rm", "last metrics on a full disk"), ("rm", "page"),
}  # fmt: skip
"""Those that `make test` runs; `make faults` runs the others."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RunDirectory]]:
    """The run of a kind that nothing disturbs."""
    runs: dict[str, RunDirectory] = {}
    yield (
        lambda kind: (
            runs[kind] if kind in runs else runs.setdefault(kind, train(config_of(kind, tmp_path_factory.mktemp(kind))))
        )
    )


def same_files(one: Path, other: Path, names: Sequence[str]) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_there_are_forty() -> None:
    assert len(CASES) == 40


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*case, marks=() if case in SHORT else pytest.mark.long) for case in CASES]
)
def test_what_was_trained_is_there_after_a_late_failure(
    kind: str,
    name: str,
    whole: Callable[[str], RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed, failure = whole(kind), failures(kind)[name]
    trackers = "[tensorboard]" if name == "no process for trackers" else "[]"
    config = config_of(kind, tmp_path, f"monitoring.trackers={trackers}")
    run = RunDirectory(tmp_path / "late")
    with monkeypatch.context() as patch:
        late = Late(patch, tmp_path)
        failure.breaks(late)
        if failure.ends_with is None:
            train(config)
        else:
            with pytest.raises(failure.ends_with, match=failure.says):
                train(config)
    assert late.failed and late.learned == STEPS
    assert run.final_step(whole=True) == STEPS, "final/ is there, whole"
    checkpoint = run.checkpoints.latest_valid()
    assert checkpoint is not None and checkpoint.step == STEPS, "the last step is committed"
    weights, expected = (load_file(one.final / "model.safetensors") for one in (run, undisturbed))
    assert all(torch.equal(weights[key], expected[key]) for key in expected), "and holds what was trained"

    forget_the_stop()
    (tmp_path / "away").unlink(missing_ok=True)
    assert run.summary_path.exists() == (failure.ends_with is None)
    if failure.ends_with is not None:
        assert reporting.status(run)["state"].startswith("trained"), "the status says the truth"
        with monkeypatch.context() as patch:
            late = Late(patch, tmp_path)
            if name == "report":
                patch.setattr(*EVALUATIONS[kind], lambda *_: pytest.fail("only the report is missing"))
            continue_run(str(run.path), place=ThisProcess(config.cluster))
        assert late.learned == 0, "the resume trains nothing"
    assert run.summary_path.exists() and run.report_path.exists() and not run.closing_path.exists()
    assert reporting.status(run)["state"] == "finished"
    assert same_files(run.final, undisturbed.final, ["config.json", "model.safetensors"])
    assert run.summary().figures == undisturbed.summary().figures


@pytest.mark.parametrize("kind", JOBS)
def test_a_run_that_was_killed_before_final_was_written_gets_it_without_training(
    kind: str, whole: Callable[[str], RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = config_of(kind, tmp_path), RunDirectory(tmp_path / "late")
    with monkeypatch.context() as patch, pytest.raises(ClosingError):
        failures(kind)["evaluation"].breaks(Late(patch, tmp_path))
        train(config)
    shutil.rmtree(run.final)
    assert reporting.status(run)["state"].startswith("stopped")
    late = Late(monkeypatch, tmp_path)
    continue_run(str(run.path), place=ThisProcess(config.cluster))
    assert late.learned == 0 and run.is_finished
    assert same_files(run.final, whole(kind).final, ["config.json", "model.safetensors"])
