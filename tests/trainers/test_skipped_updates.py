"""Updates that stand out, in whole small runs: they change no weight and reach no checkpoint, and too many have an end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.groups import Group
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.errors import NumericalError, ResumableStop
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import status, time_of
from rlhf_ray.trainers.checkpointing import Checkpointer
from tests.trainers.small_runs import ask_to_stop, config_of, forget_the_stop, signals_as_before, train

pytestmark = pytest.mark.early

LENGTH = {"sft": "epochs=3", "ppo": "steps=12"}
GUARDS = {"gradient_norm": 20.0, "window": 8}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


def settings(kind: str, **guards: object) -> list[str]:
    text = ", ".join(f"{key}: {value}" for key, value in {**GUARDS, **guards}.items())
    return [LENGTH[kind], "checkpoint.every_steps=2", f"guards={{{text}}}"]


class Updates:
    """Counts the updates of a run, from 1. Those named in ``spikes`` have gradients ten thousand times too large, and those in
    ``dropped`` are voted down. The update of the self-check, before the first one, is not counted.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        spikes: Collection[int] = (),
        dropped: Collection[int] = (),
        stop: int = 0,
    ) -> None:
        self.number = 0
        accumulate, apply = Group.accumulate, Group.apply

        def spiking(group: Group, shared: Any, update: Any, loss: Any, denominator: float) -> Any:
            self.number += 1
            return accumulate(group, shared, update, loss, denominator * (1e-4 if self.number in spikes else 1.0))

        def applying(group: Group, skip: bool, *limit: float) -> Any:
            checks = skip and self.number == 1
            if checks:
                self.number = 0
            if self.number == stop > 0:
                ask_to_stop()
            return apply(group, skip or self.number in dropped, *limit)

        monkeypatch.setattr(Group, "accumulate", spiking)
        monkeypatch.setattr(Group, "apply", applying)


def run(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch, guards: dict[str, object], **updates: Any
) -> RunDirectory:
    """A whole run in the directory ``root``."""
    root.mkdir()
    with monkeypatch.context() as patch:
        Updates(patch, **updates)
        return train(config_of(kind, root, *settings(kind, **guards)))


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.final / "model.safetensors")


def same(one: RunDirectory, other: RunDirectory) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def logged(run: RunDirectory, name: str) -> list[float]:
    return [line[name] for line in run.metrics.read() if name in line]


@pytest.mark.parametrize(("guard", "name"), [
    ("gradient_norm", "grad_norm/policy "), pytest.param("loss", "loss/policy ", marks=pytest.mark.long),
])  # fmt: skip
def test_a_spike_is_as_if_its_update_had_been_voted_down_on_all_ranks(
    guard: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off: dict[str, object] = {"gradient_norm": "null"}
    dropped = run(tmp_path / "dropped", "sft", monkeypatch, off, dropped={7})
    assert not same(run(tmp_path / "unguarded", "sft", monkeypatch, off, spikes={7}), dropped)
    spiked = run(tmp_path / guard, "sft", monkeypatch, {**off, guard: 20.0}, spikes={7})
    assert same(spiked, dropped)
    assert sum(logged(spiked, "updates/skipped")) == sum(logged(spiked, "updates/stood_out")) == 1
    (incident,) = spiked.incidents.read()
    assert (incident.step, incident.fault, incident.action) == (7, "numeric", "skipped")
    assert incident.cause.startswith(name)


@pytest.mark.long
def test_a_run_that_is_resumed_knows_what_is_ordinary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", "sft", monkeypatch, {}, spikes={7})
    with pytest.raises(ResumableStop):
        run(tmp_path / "resumed", "sft", monkeypatch, {}, spikes={7}, stop=6)
    forget_the_stop()
    resumed = RunDirectory(tmp_path / "resumed" / "late")
    with monkeypatch.context() as patch:
        Updates(patch, spikes={1})  # the seventh of all
        continue_run(str(resumed.path), place=ThisProcess(config_of("sft", tmp_path).cluster))
    assert same(resumed, whole) and sum(logged(resumed, "updates/stood_out")) == 1

    first, second = resumed.attempts.read()
    assert first["timestamp"] < first.get("stopped", 0.0) < second["timestamp"] and "stopped" not in second
    spent, end = time_of(resumed), resumed.metrics.read()[-1]["timestamp"]
    pause = second["timestamp"] - first["stopped"]
    assert spent.whole_s == pytest.approx(end - first["timestamp"] - pause, abs=1e-3)
    assert spent.useful_s + sum(spent.lost_s.values()) == pytest.approx(spent.whole_s)
    assert (
        status(resumed)["useful time"].startswith(f"{spent.share:.1%} of") and "start" in status(resumed)["time lost"]
    )
    assert len(logged(resumed, "useful_time")) == 2, "once an attempt, since both are short"


@pytest.mark.parametrize("kind", ["sft", pytest.param("ppo", marks=pytest.mark.long)])
def test_a_run_goes_back_to_weights_from_before_the_first_skip_and_goes_on_with_the_next_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = {"budget": 1, "on_budget": "go_back"}
    committed, save = [], Checkpointer.save

    def saving(self: Checkpointer, step: int, state: Any) -> None:
        committed.append(step)
        save(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", saving)
        gone = run(tmp_path / "gone", kind, monkeypatch, back, spikes={7, 9})
    assert 9 in committed, "so that a resumed run meets none of these rows again"
    assert same(gone, run(tmp_path / "dropped", kind, monkeypatch, {}, dropped={7, 8, 9})), "as if 7 to 9 had not been"
    assert [(one.action, one.step, one.back_to, one.lost_steps) for one in gone.incidents.read()] == [
        ("skipped", 7, 7, 0), ("skipped", 9, 9, 0), ("rolled_back", 9, 6, 3),
    ]  # fmt: skip
    steps = {line["step"]: line["time/step"] for line in gone.metrics.read() if "time/step" in line}
    assert list(steps) == list(range(1, 13)), "none is made twice"
    undone, spent = {7, 8, 9}, time_of(gone)
    assert spent.useful_s <= sum(seconds for step, seconds in steps.items() if step not in undone) * 1.001
    assert spent.lost_s.get("repeated steps", 0.0) > 0 and "uncommitted steps" not in spent.lost_s


def test_the_commit_to_go_back_to_is_kept_while_skipped_updates_are_committed_also_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back, each = {"budget": 1, "on_budget": "go_back"}, "checkpoint={every_steps: 1, keep: 2}"
    stopped = RunDirectory(tmp_path / "late")
    with monkeypatch.context() as patch, pytest.raises(ResumableStop):
        Updates(patch, spikes={7}, stop=8)
        train(config_of("sft", tmp_path, *settings("sft", **back), each))
    forget_the_stop()
    assert stopped.checkpoints.steps() == [6, 7, 8]
    with monkeypatch.context() as patch:
        Updates(patch, spikes={1})  # the ninth of all
        continue_run(str(stopped.path), place=ThisProcess(config_of("sft", tmp_path).cluster))
    assert [one.back_to for one in stopped.incidents.read() if one.action == "rolled_back"] == [6]
    assert stopped.checkpoints.steps() == [11, 12], "and not for longer than it may be needed"


@pytest.mark.parametrize(("guards", "sentence"), [
    ({"budget": 1}, r"2 of the last 8 updates were skipped \(guards.budget\)"),
    pytest.param({"budget": 1, "on_budget": "go_back", "max_going_back": 1}, r"2 of the last 8 updates were skipped",
                 marks=pytest.mark.long),
    pytest.param({"budget": 1, "on_budget": "go_back", "max_going_back": 0}, r"2 of the last 8 updates were skipped",
                 marks=pytest.mark.long),
], ids=["stop", "went back once", "may not go back"])  # fmt: skip
def test_a_run_whose_updates_go_on_to_stand_out_ends_with_what_it_learned_before(
    guards: dict[str, object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NumericalError, match=sentence):
        run(tmp_path / "run", "sft", monkeypatch, guards, spikes=range(7, 100))
    ended = RunDirectory(tmp_path / "run" / "late")
    assert not ended.final.exists() and ended.checkpoints.latest_valid() is not None
    went_back = [one.back_to for one in ended.incidents.read() if one.action == "rolled_back"]
    assert went_back == ([6] if guards.get("max_going_back") == 1 else [])
