"""A state saved by two ranks and loaded by one or three: the curve of the training that never stopped.

The short form, with one rank, is part of ``test_engine.py``, whose programs of one and two ranks run anyway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rlhf_ray
from rlhf_ray.engine import shards, universal
from rlhf_ray.errors import IntegrityError, RlhfRayError
from rlhf_ray.network import LOOPBACK, free_port
from tests.engine.curves import BACK, CASES, STARTS, UPDATES_AFTER, farthest

PROGRAM = Path(__file__).parent / "other_ranks_program.py"
BAR, BF16_BAR = 1e-5, 2e-2
DEADLINE_S = 500
Measured = dict[str, Any]


def run(directory: Path, part: str, worlds: list[int]) -> dict[int, list[Measured]]:
    """Run a part by groups of these sizes side by side; what each rank measured."""
    variables = {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(rlhf_ray.__file__).parents[1]),
    }  # fmt: skip
    started = []
    for world in worlds:
        port = str(free_port(LOOPBACK))
        for rank in range(world):
            command = [sys.executable, str(PROGRAM), str(rank), str(world), port, str(directory), part]
            started.append(
                subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
    try:
        for process in started:
            output, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, output.decode()[-6000:]
    finally:
        for process in started:
            process.kill()
    return {
        world: [json.loads((directory / f"{part}-{world}-{rank}.json").read_text()) for rank in range(world)]
        for world in worlds
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Signs that DeepSpeed's converter would take for a pattern.
    return tmp_path_factory.mktemp("other ranks (a+b)")


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> list[Measured]:
    return run(directory, "save", [2])[2]


@pytest.fixture(scope="module")
def elsewhere(directory: Path, undisturbed: list[Measured]) -> dict[int, list[Measured]]:
    return run(directory, "load", [1, 3])


@pytest.fixture(scope="module")
def back(directory: Path, elsewhere: dict[int, list[Measured]]) -> list[Measured]:
    return run(directory, "back", [2])[2]


@pytest.mark.long
@pytest.mark.parametrize("case", [*CASES, *STARTS])
@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_goes_on_along_the_curve_that_never_stopped(
    case: str, world: int, undisturbed: list[Measured], elsewhere: dict[int, list[Measured]]
) -> None:
    expected = undisturbed[0][case]
    for rank in elsewhere[world]:
        assert farthest(rank[case]["curve"], expected["curve"]) <= (BF16_BAR if "bf16" in case else BAR)
        assert rank[case]["steps"] == expected["steps"] and rank[case]["updates"] == expected["updates"]
        assert rank[case]["decays"] == [0.5, 0.0]


@pytest.mark.long
@pytest.mark.parametrize("case", BACK)
@pytest.mark.parametrize("world", [1, 3])
def test_a_run_that_was_elsewhere_comes_back(
    case: str, world: int, undisturbed: list[Measured], back: list[Measured]
) -> None:
    expected = undisturbed[0][case]["curve"][UPDATES_AFTER // 2 :]
    for rank in back:
        curve = rank[f"{case}-of-{world}"]["curve"][: len(expected)]
        assert farthest(curve, expected) <= BAR


@pytest.mark.long
def test_nothing_is_left_of_what_was_converted(directory: Path, back: list[Measured]) -> None:
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_a_rank_that_is_new_has_a_random_state_of_its_own_the_same_at_every_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise_of(rank: int, updates: int) -> tuple[float, ...]:
        torch.seed()  # whatever the process has drawn before
        monkeypatch.setattr(shards.dist, "get_rank", lambda: rank)
        shards._continue_random_state(tmp_path, 2, updates, torch.device("cpu"))
        return tuple(torch.rand(3).tolist())

    with torch.random.fork_rng(devices=[]):
        for saved in range(2):
            torch.manual_seed(saved)
            save_file({"cpu": torch.get_rng_state()}, tmp_path / f"random-{saved}.safetensors")
            assert noise_of(saved, 7) == tuple(torch.rand(3, generator=torch.Generator().manual_seed(saved)).tolist())
        found = [noise_of(rank, updates) for rank in range(2, 5) for updates in (7, 8)]
        assert found == [noise_of(rank, updates) for rank in range(2, 5) for updates in (7, 8)]
        assert len({noise_of(0, 7), noise_of(1, 7), *found}) == 8


@pytest.mark.long
def test_what_is_put_right_after_deepspeed_is_still_wrong_there(elsewhere: dict[int, list[Measured]]) -> None:
    """Where it no longer is, what is put right can go."""
    alone = elsewhere[1][0]["deepspeed-alone"]
    assert alone == {"step_counts": 1, "decays": [0.5, 0.5], "temperature": [1.5] * 3}


class Spy:
    """Writes a file when it is read by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_shards_is_run_when_they_are_converted(tmp_path: Path) -> None:
    saved, ran = tmp_path / "shards", tmp_path / "ran"
    saved.mkdir()
    torch.save({"optimizer_state_dict": Spy(ran)}, saved / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(RlhfRayError) as error:
        universal._converted(saved, tmp_path, without_moments=False)
    assert not ran.exists()
    assert isinstance(error.value, IntegrityError)
    assert "would run code when it is read (getattr)" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


@pytest.mark.long
def test_the_converter_does_not_outlive_the_rank_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    # Reading this would never end.
    os.mkfifo(tmp_path / "shards" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    command = [sys.executable, "-m", "rlhf_ray.engine.conversion"]
    variables = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(rlhf_ray.__file__).parents[1])}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        try:
            assert process.wait(timeout=100) == 1
        finally:
            process.kill()
