"""Checkpoints that are written while training goes on hold the step that was saved, and what goes wrong with them surfaces.

Real DeepSpeed in this process; a writer is held back until training has gone on.
"""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.groups import Group
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.sections.run import CheckpointConfig
from rlhf_ray.engine import shards
from rlhf_ray.engine.engine import Engine
from rlhf_ray.engine.saving.room import Room
from rlhf_ray.engine.saving.writer import Written
from rlhf_ray.errors import DiskFullError, GroupError, NumericalError, ResumableStop
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.pending import Pending
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.manifest import FileRecord, hash_files
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.supervised.best import Best
from tests.trainers.small_runs import ask_to_stop, config_of, forget_the_stop, signals_as_before, train

pytestmark = pytest.mark.early

EACH_STEP = "checkpoint.every_steps=1"
CASES = {
    "ppo": ("ppo", ["policy.engine.zero=2", "steps=3"]),
    "sft": ("sft", ["policy.engine.zero=2", "epochs=0.75"]),
    "lora": ("sft", ["policy.engine.zero=2", "policy.model.lora={rank: 2}", "epochs=0.75"]),
    "rm": ("rm", ["epochs=1.5"]),
}
"""Runs of three steps. All but PPO are ``long``."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


class Writer:
    """Holds back what ranks write until it is told to go on."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), 0


@contextmanager
def held_back(patch: pytest.MonkeyPatch, act: Callable[[], None] = lambda: None) -> Iterator[Writer]:
    """Let what is written in the background wait, and then ``act``."""
    writer, write = Writer(), shards.Unwritten.write

    def later(self: shards.Unwritten) -> dict[str, FileRecord]:
        if threading.current_thread() is not threading.main_thread():
            writer.began += 1
            assert writer.go.wait(60), "the writer was forgotten"
            act()
        return write(self)

    with patch.context() as context:
        context.setattr(shards.Unwritten, "write", later)
        try:
            yield writer
        finally:
            writer.go.set()


def after_updates(patch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> None:
    """Do ``act`` once ``count`` updates of this attempt have changed weights."""
    apply, applied = Engine.apply, []

    def counted(self: Engine, skip: bool, **options: Any) -> Any:
        outcome = apply(self, skip, **options)
        applied.append(not skip)
        if sum(applied) == count and not skip:
            act()
        return outcome

    patch.setattr(Engine, "apply", counted)


def asking_to_stop(begin: Callable[..., Any]) -> Callable[..., Any]:
    """``begin``, before which this process is asked to stop."""
    return lambda *arguments: (ask_to_stop(), begin(*arguments))[1]


class Crash(BaseException):
    """The driver is gone."""


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.long) if name != "ppo" else name for name in CASES]
)
def test_a_run_that_goes_on_from_a_checkpoint_in_the_background_ends_in_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, overrides = CASES[case]
    (tmp_path / "whole").mkdir()
    expected = load_file(train(config_of(kind, tmp_path / "whole", *overrides)).final / "model.safetensors")
    config, run = config_of(kind, tmp_path, EACH_STEP, *overrides), RunDirectory(tmp_path / "late")
    seen = list[list[int]]()

    with monkeypatch.context() as patch, held_back(patch) as writer:

        def crash_after_a_commit_of_the_step_before() -> None:
            seen.append(run.checkpoints.steps())
            writer.go.set()
            raise Crash

        after_updates(patch, 2, crash_after_a_commit_of_the_step_before)
        with pytest.raises(Crash):
            train(config)
    assert writer.began == 1 and seen == [[]], "the second update was applied before a byte of the first was written"
    assert run.checkpoints.steps() == [1] and not [*run.path.rglob(".pending-*")]
    continue_run(str(run.path), place=ThisProcess(config.cluster))
    weights = load_file(run.final / "model.safetensors")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert run.checkpoints.steps()[-1] == 3


@pytest.mark.parametrize("kind", [pytest.param("ppo", marks=pytest.mark.long), "sft"])
def test_an_error_of_the_writer_is_raised_at_the_next_step_and_the_commit_before_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = "steps=9" if kind == "ppo" else "epochs=2.25"
    config, run = config_of(kind, tmp_path, "checkpoint.every_steps=3", length), RunDirectory(tmp_path / "late")
    writes, write, raise_failure = [0], shards.Unwritten.write, Checkpointer.raise_failure

    def full(self: shards.Unwritten) -> dict[str, FileRecord]:
        writes[0] += 1
        if writes[0] >= 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.directory / "shards"))
        return write(self)

    def once_it_is_known(self: Checkpointer) -> None:
        while self._busy:
            time.sleep(0.005)
        raise_failure(self)

    monkeypatch.setattr(shards.Unwritten, "write", full)
    monkeypatch.setattr(Checkpointer, "raise_failure", once_it_is_known)
    with pytest.raises(DiskFullError) as caught:
        train(config)
    assert str(caught.value).startswith(f"disk full: cannot write {run.checkpoints.checkpoint_path(6)}/policy/shards")
    assert "rlhf-ray resume" in str(caught.value)
    assert run.checkpoints.steps() == [3] and not [*run.path.rglob(".pending-*")]
    assert writes[0] == 3, "what was finished is tried once more before the run ends"
    steps = [line["step"] for line in run.metrics.read() if "time/step" in line]
    assert steps[-1] == (5 if kind == "ppo" else 6), "nothing was done that comes after the error was known"
    monkeypatch.undo()
    continue_run(str(run.path), place=ThisProcess(config.cluster))
    assert run.checkpoints.steps()[-1] == 9


@pytest.mark.parametrize("kind", [pytest.param("ppo", marks=pytest.mark.long), "sft"])
def test_a_stop_waits_until_what_is_being_written_is_committed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = RunDirectory(tmp_path / "late"), list[list[int]]()
    settle = Checkpointer.settle
    with held_back(monkeypatch) as writer:

        def let_it_write(self: Checkpointer) -> None:
            if writer.began:
                seen.append(run.checkpoints.steps())
                writer.go.set()
            settle(self)

        monkeypatch.setattr(Checkpointer, "settle", let_it_write)
        monkeypatch.setattr(Group, "begin_save", asking_to_stop(Group.begin_save))
        with pytest.raises(ResumableStop, match=r"stopped on request after (step|update) 1 of 2"):
            train(config_of(kind, tmp_path, EACH_STEP))
    assert seen[0] == [] and run.checkpoints.steps() == [1]
    forget_the_stop()


@pytest.mark.parametrize("fails", ["once", "always"])
@pytest.mark.parametrize("kind", [pytest.param("ppo", marks=pytest.mark.long), "sft"])
def test_a_stop_makes_up_for_a_commit_that_failed_or_ends_with_its_error(
    kind: str, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    run, writes, write = RunDirectory(tmp_path / "late"), [0], shards.Unwritten.write

    def full(self: shards.Unwritten) -> dict[str, FileRecord]:
        writes[0] += 1
        if writes[0] == 1 or fails == "always":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.directory / "shards"))
        return write(self)

    monkeypatch.setattr(shards.Unwritten, "write", full)
    monkeypatch.setattr(Group, "begin_save", asking_to_stop(Group.begin_save))
    expected = ResumableStop if fails == "once" else DiskFullError
    with pytest.raises(expected) as caught:
        train(config_of(kind, tmp_path, EACH_STEP))
    assert "the checkpoint of step 1 could not be written" in project_log.getvalue()
    assert run.checkpoints.steps() == ([1] if fails == "once" else [])
    assert "rlhf-ray resume" in str(caught.value)
    forget_the_stop()


def test_best_is_kept_after_the_commit_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = RunDirectory(tmp_path / "late"), list[tuple[int, list[int]]]()
    keep = Best.keep

    def look(self: Best) -> None:
        assert self.so_far is not None
        seen.append((self.so_far.update, run.checkpoints.steps()))
        keep(self)

    monkeypatch.setattr(Best, "keep", look)
    with held_back(monkeypatch) as writer:
        threading.Timer(1.0, writer.go.set).start()
        train(config_of("rm", tmp_path, EACH_STEP, "evaluation={every_steps: 1, keep_best: true}"))
    assert seen[0] == (1, [1])


class HeldRanks:
    """Ranks whose files appear when they are told so."""

    role, size = "policy", 1

    def __init__(self, free: int = 100) -> None:
        self.free, self.calls = free, list[str]()
        self.seconds = 0.0
        self.go, self.error = threading.Event(), None

    def call(self, method: str, arguments: Any, **options: Any) -> Pending[list[Any]]:
        self.calls.append(method)
        return Pending.done([getattr(self, method)(*own) for own in arguments])

    def room_to_save(self) -> Room:
        return Room("here", 50, self.free)

    def save(self, directory: str) -> dict[str, FileRecord]:
        Path(directory).mkdir()
        (Path(directory) / "rank-0").write_text("state")
        return hash_files(directory)

    def begin_save(self, directory: str) -> None:
        self.directory = directory

    def saved(self) -> Written:
        assert self.go.wait(10)
        return Written(self.save(self.directory), self.seconds)


def saving_by(ranks: HeldRanks, path: Path, **options: Any) -> Checkpointer:
    run = RunDirectory.create(path, "kind: sft\n")
    return Checkpointer(run, CheckpointConfig(**options), {"policy": Group(ranks)}, None, 1000)


def test_what_is_being_written_is_not_committed_and_its_state_is_that_of_its_step(tmp_path: Path) -> None:
    ranks, state = HeldRanks(), {"progress": {"update": 7}}
    saving = saving_by(ranks, tmp_path / "run")
    saving.save(7, state)
    saving.schedule.clock = lambda: time.monotonic() + 3600.0
    state["progress"]["update"] = 8
    assert saving.committed is None and saving.run.checkpoints.steps() == []
    assert not saving.schedule.is_due(900), "the next one waits until this one is there"
    saving.save(7, state)
    assert ranks.calls == ["room_to_save", "begin_save", "saved"], "a step is saved once"
    ranks.go.set()
    saving.settle()
    assert saving.committed == 7 and saving.schedule.is_due(900)
    checkpoint = saving.run.checkpoints.latest_valid()
    assert checkpoint is not None and checkpoint.manifest.about["state"] == {"progress": {"update": 7}}
    saving.save(7, state)
    assert ranks.calls[3:] == [], "nor when it is committed"


@pytest.mark.parametrize(("seconds", "due"), [(0.0, True), (5.0, False)])
def test_what_writers_take_of_processors_puts_the_next_one_off(seconds: float, due: bool, tmp_path: Path) -> None:
    ranks = HeldRanks()
    ranks.seconds = seconds
    saving = saving_by(ranks, tmp_path / "run")
    ranks.go.set()
    saving.save(7, {})
    saving.settle()
    saving.schedule.clock = lambda: time.monotonic() + 800.0
    assert saving.schedule.is_due(900) is due


def test_where_the_memory_is_short_ranks_write_at_once_and_that_is_said_once(
    tmp_path: Path, project_log: io.StringIO
) -> None:
    ranks = HeldRanks(free=49)
    saving = saving_by(ranks, tmp_path / "run")
    for step in (1, 2):
        saving.save(step, {})
        assert saving.committed == step
    assert ranks.calls == ["room_to_save", "save"] * 2
    said = project_log.getvalue()
    assert said.count("copies of the state would take") == 1 and "set checkpoint.background: false" in said


def test_every_copy_asks_for_its_memory_since_that_of_the_copy_before_is_no_longer_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = list[int](), Engine.room_to_save

    def note(self: Engine) -> Room:
        room = ask(self)
        asked.append(room.needed // self.shard_bytes)
        return room

    monkeypatch.setattr(Engine, "room_to_save", note)
    train(config_of("sft", tmp_path, EACH_STEP))
    assert asked == [1, 1]


def test_who_wants_no_copy_gets_none(tmp_path: Path) -> None:
    ranks = HeldRanks()
    saving = saving_by(ranks, tmp_path / "run", background=False)
    saving.save(1, {})
    assert saving.committed == 1 and ranks.calls == ["save"]


def test_a_rank_that_dies_while_it_writes_leaves_no_half_checkpoint(tmp_path: Path, project_log: io.StringIO) -> None:
    ranks = HeldRanks()
    saving = saving_by(ranks, tmp_path / "run")
    ranks.go.set()
    saving.save(1, {})
    saving.settle()

    def dies() -> None:
        (Path(ranks.directory)).mkdir()
        (Path(ranks.directory) / "half").write_text("st")
        raise GroupError("policy", 0, "save", "died")

    ranks.saved = dies  # type: ignore[method-assign, assignment]
    saving.save(2, {})
    with pytest.raises(GroupError, match="died"):
        saving.settle()
    saving.settle()  # an error is raised once
    assert saving.committed == 1 and saving.run.checkpoints.steps() == [1]
    assert not [*saving.run.path.rglob(".pending-*")]
    saving.save(3, {})
    saving.close()
    assert "the checkpoint of step 3 could not be written" in project_log.getvalue()


class LateRanks(HeldRanks):
    """Ranks that write in a thread, and go on to write whatever becomes of others; they make the directories that they need."""

    role = "critic"

    def call(self, method: str, arguments: Any, **options: Any) -> Pending[list[Any]]:
        if method != "saved":
            return super().call(method, arguments, **options)
        self.thread = threading.Thread(target=self.write)
        self.thread.start()
        return Pending(lambda: [self.thread.join(), {}][1:])

    def write(self) -> None:
        assert self.go.wait(10)
        Path(self.directory).mkdir(parents=True)
        (Path(self.directory) / "rank-0").write_text("state")


def test_a_save_that_fails_leaves_nothing_of_groups_that_were_still_writing(tmp_path: Path) -> None:
    policy, critic = HeldRanks(), LateRanks()
    saving = saving_by(policy, tmp_path / "run")
    saving.groups["critic"] = Group(critic)

    def dies() -> None:
        raise GroupError("policy", 0, "save", "died")

    policy.saved = dies  # type: ignore[method-assign, assignment]
    saving.save(1, {})
    threading.Timer(0.3, critic.go.set).start()
    with pytest.raises(GroupError, match="died"):
        saving.settle()
    critic.thread.join()
    assert not [*saving.run.path.rglob(".pending-*")]
    Path(policy.directory).mkdir(parents=True)  # by another rank of the group that is lost
    saving.save(2, {})
    with pytest.raises(GroupError, match="died"):
        saving.settle()
    assert not [*saving.run.path.rglob(".pending-*")]


def test_after_going_back_nothing_that_was_learned_since_is_left_to_commit(tmp_path: Path) -> None:
    saving = saving_by(HeldRanks(), tmp_path / "run", background=False)
    saving.save(5, {})
    saving.refuse_skips(0, 3, 9, {}, "advice")
    assert saving.find_newest() == 5
    with pytest.raises(NumericalError, match="3 updates in a row"):
        saving.refuse_skips(3, 3, 8, {}, "advice")
    assert saving.run.checkpoints.steps() == [5]
