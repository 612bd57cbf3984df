"""The campaign's judge: a single flipped bit, a prompt used twice and a lost file are told from an identical run."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_ray.runs.directory import RunDirectory
from tests.faults.killing import HangError, StartedRun
from tests.faults.verdict import ledger_differences, weight_differences

PROMPTS = ((4, 2), (3, 1))


def make_run(path: Path, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> Path:
    run = RunDirectory.create(path, "kind: ppo\n")
    for step, chosen in enumerate(prompts, 1):
        run.ledger.append(step, chosen)
    (path / "final" / "critic").mkdir(parents=True)
    weights = {"a": torch.tensor([0.0, 1.5]), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    for part in (".", "critic"):
        save_file(weights, path / "final" / part / "model.safetensors")
    run.release()
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make_run(tmp_path / "whole")


def test_a_copy_is_identical(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    assert weight_differences(tmp_path / "copy", whole) == ledger_differences(tmp_path / "copy", whole) == []


@pytest.mark.parametrize("change", [torch.tensor([-0.0, 1.5]), torch.tensor([0.0, 1.5000001])])
def test_one_other_bit_is_named(whole: Path, tmp_path: Path, change: torch.Tensor) -> None:
    other = make_run(tmp_path / "other")
    file = other / "final" / "critic" / "model.safetensors"
    save_file({**load_file(file), "a": change}, file)
    assert weight_differences(other, whole) == ["final/critic/model.safetensors: a"]


def test_a_lost_file_is_named_and_nothing_to_compare_with_is_an_error(whole: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    (other / "final" / "critic" / "model.safetensors").unlink()
    (difference,) = weight_differences(other, whole)
    assert "critic" in difference
    shutil.rmtree(whole / "final")
    with pytest.raises(AssertionError, match="no final weights"):
        weight_differences(other, whole)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (((4, 2), (3, 4)), "prompt 4 was used 2 times"),
        (((4, 2),), "1 steps in the ledger"),
        (((4, 2), (1, 3)), "step 2 has other prompts"),
    ],
)
def test_other_prompts_are_named(
    whole: Path, tmp_path: Path, prompts: tuple[tuple[int, ...], ...], expected: str
) -> None:
    assert expected in ledger_differences(make_run(tmp_path / "other", prompts), whole)


FAMILY = """
import subprocess, sys, time
if "rlhf_ray.launch.driver" in sys.argv:
    actor = subprocess.Popen(["ray::Policy", "-c", "import time; time.sleep(60)"], executable=sys.executable)
    sys.exit(7 if actor.wait() == -9 else 0)
sys.exit(subprocess.call([sys.executable, __file__, "rlhf_ray.launch.driver"]))
"""


def family(tmp_path: Path) -> list[str]:
    """A command with the processes of a run: parent, driver and one actor."""
    (tmp_path / "family.py").write_text(FAMILY)
    return [sys.executable, str(tmp_path / "family.py")]


def test_an_actor_is_found_and_killed(tmp_path: Path) -> None:
    run = StartedRun(family(tmp_path), tmp_path / "log", 30.0)
    title = run.kill("actor", 0.0, random.Random(0))
    assert title is not None and title.startswith("ray::Policy") and run.wait() == 7


def test_a_driver_that_outlives_its_parent_is_waited_for(tmp_path: Path) -> None:
    run = StartedRun(family(tmp_path), tmp_path / "log", 6.0)
    assert run.kill("parent", 3.0, random.Random(0)) is not None
    with pytest.raises(HangError):  # the driver goes on: the end of its parent is not the end of the run
        run.wait()


def test_a_run_that_does_not_end_is_ended_and_said_to_hang(tmp_path: Path) -> None:
    run = StartedRun(family(tmp_path), tmp_path / "log", 3.0)
    with pytest.raises(HangError):
        run.wait()
    assert not run.parent.is_running()


def test_a_campaign_that_is_stopped_takes_its_run_along(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StartedRun(family(tmp_path), tmp_path / "log", 30.0) as run:
        raise KeyboardInterrupt
    assert not run.parent.is_running()


def test_a_run_that_ends_first_was_not_killed(tmp_path: Path) -> None:
    run = StartedRun([sys.executable, "-c", ""], tmp_path / "log", 30.0)
    assert run.kill("driver", 20.0, random.Random(0)) is None and run.wait() == 0
