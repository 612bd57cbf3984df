"""A PPO step that would not end within the grace is broken off where it changes no weight, and the step before is committed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.errors import Interrupted, ResumableStop
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.loop import PpoTrainer
from rlhf_ray.trainers.ppo.sampling import FixedSampling
from tests.trainers.small_runs import ask_to_stop, config_of, forget_the_stop, signals_as_before, train

pytestmark = pytest.mark.early


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


@pytest.mark.parametrize("late", [True, False])
def test_a_signal_breaks_off_only_what_may_be_and_would_take_too_long(late: bool) -> None:
    stopping.listen()
    stopping.steps_begin()
    reached = []
    try:
        with stopping.breaking_off(lambda: late):
            ask_to_stop()
            time.sleep(0.01)
            reached.append("end")
    except Interrupted:
        reached.append("broken off")
    assert reached == ["broken off" if late else "end"] and stopping.stop_requested()


def test_a_signal_after_such_a_part_breaks_off_nothing() -> None:
    stopping.listen()
    stopping.steps_begin()
    with stopping.breaking_off(lambda: True):
        pass
    ask_to_stop()
    time.sleep(0.01)
    with pytest.raises(Interrupted), stopping.breaking_off(lambda: True):
        raise AssertionError("a part that begins after the request is not begun")


class Long(list[float]):
    """Steps that all took long."""

    def append(self, seconds: float) -> None:
        super().append(1e6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    with signals_as_before():
        return load_file(
            train(config_of("ppo", tmp_path_factory.mktemp("whole"), "steps=3")).final / "model.safetensors"
        )


@pytest.mark.parametrize("breaks_off", [
    pytest.param(True, id="while it waits"), pytest.param(False, id="before it learns", marks=pytest.mark.long),
])  # fmt: skip
def test_the_step_before_is_committed_and_the_run_goes_on_in_the_same_bits(
    breaks_off: bool, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("ppo", tmp_path, "steps=3", "checkpoint.every_steps=0", "run.stop_grace_s=1000.0")
    calls: list[str] = []
    collect, run, scored = FixedSampling.collect, PpoTrainer.run, Experience.gather

    def asked_in_the_third(sampling: Any, *arguments: Any, **options: Any) -> Any:
        calls.append("collect")
        if calls.count("collect") == 3:
            ask_to_stop()
            time.sleep(0.01)
        return collect(sampling, *arguments, **options)

    def gathered(*arguments: Any, **options: Any) -> Any:
        calls.append("scored")
        return scored(*arguments, **options)

    def may_break_off(trainer: PpoTrainer) -> None:
        trainer.grace.waits = breaks_off
        trainer.grace.step_times = Long()  # type: ignore[assignment]
        calls.clear()  # the self-check and the evaluation of the start
        run(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(FixedSampling, "collect", asked_in_the_third)
        patch.setattr(Experience, "gather", gathered)
        patch.setattr(PpoTrainer, "run", may_break_off)
        with pytest.raises(ResumableStop, match="after step 2 of 3"):
            train(config)
    assert calls.count("scored") == (2 if breaks_off else 3), "what waits is broken off at once"
    kept = RunDirectory(tmp_path / "late")
    assert kept.checkpoints.steps() == [2]
    forget_the_stop()
    continue_run(str(kept.path), place=ThisProcess(config.cluster))
    final = load_file(kept.final / "model.safetensors")
    assert all(torch.equal(final[name], whole[name]) for name in whole)
