"""Where the time of a run went: by hand, and as a property of any files."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rlhf_ray.monitoring.useful_time import REASONS, Interruption, useful_time


def attempt(at: float, stopped: float | None = None) -> dict[str, Any]:
    return {"timestamp": at} if stopped is None else {"timestamp": at, "stopped": stopped}


def step(number: int, end: float, took: float, checkpoint: float = 0.0) -> dict[str, Any]:
    line = {"step": number, "timestamp": end, "time/step": took}
    return {**line, "time/checkpoint": checkpoint} if checkpoint else line


TEN = [step(number, 10.0 * number + 20.0, 10.0) for number in range(1, 11)]


def died(at: float, seconds: float, *, hung: bool = False) -> Interruption:
    return Interruption(at, seconds, hung=hung, repeats=True)


CASES: dict[str, tuple[dict[str, Any], float, dict[str, float]]] = {
    "a run that nothing disturbed": (
        {"attempts": [attempt(0.0)], "lines": TEN, "committed": 10}, 100.0, {"start": 20.0},
    ),
    "steps after the last commit": (
        {"attempts": [attempt(0.0)], "lines": TEN, "committed": 8}, 80.0, {"start": 20.0, "uncommitted steps": 20.0},
    ),
    "a run under way": (
        {"attempts": [attempt(0.0)], "lines": TEN, "committed": 10, "now": 126.0}, 100.0, {"start": 20.0, "other": 6.0},
    ),
    "checkpoints that training waits for": (
        {"attempts": [attempt(0.0)], "lines": [step(1, 30.0, 10.0, 2.0), step(2, 40.0, 10.0)], "committed": 2},
        18.0, {"start": 20.0, "checkpoints": 2.0},
    ),
    "a driver that died": (
        # Two of four steps are done again; it died some time after step 4, and was back after 15 s.
        {"attempts": [attempt(0.0), attempt(75.0)], "void": TEN[2:4],
         "lines": [*TEN[:2], step(3, 95.0, 10.0), step(4, 105.0, 10.0)], "committed": 4},
        40.0, {"start": 20.0 + 10.0, "repeated steps": 20.0, "down": 15.0},
    ),
    "a run that was stopped on request": (
        {"attempts": [attempt(0.0, stopped=42.0), attempt(1000.0)],
         "lines": [*TEN[:2], step(3, 1025.0, 10.0)], "committed": 3},
        30.0, {"start": 20.0 + 15.0, "other": 2.0},
    ),
    "a rank that died in a step and was restarted in place": (
        # 4 s into step 2; 5 s later the step begins anew, and takes 10 s.
        {"attempts": [attempt(0.0)], "lines": [TEN[0], step(2, 49.0, 19.0)], "committed": 2,
         "interruptions": [died(34.0, 5.0)]},
        20.0, {"start": 20.0, "repeated steps": 4.0, "restarts": 5.0},
    ),
    "a rank that hung": (
        {"attempts": [attempt(0.0)], "lines": [TEN[0], step(2, 105.0, 75.0)], "committed": 2,
         "interruptions": [died(90.0, 5.0, hung=True)]},
        20.0, {"start": 20.0, "stalls": 60.0, "restarts": 5.0},
    ),
    "updates that were undone": (
        {"attempts": [attempt(0.0)], "lines": TEN, "committed": 10,
         "interruptions": [Interruption(109.5, 0.4, hung=False, repeats=False, undone=(6, 9))]},
        70.0, {"start": 20.0, "repeated steps": 29.6, "restarts": 0.4},
    ),
    "a run that has not made a step": (
        {"attempts": [attempt(5.0)], "lines": [], "committed": 0, "now": 9.0}, 0.0, {"other": 4.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_second_is_useful_or_lost_for_a_reason(name: str) -> None:
    files, useful, lost = CASES[name]
    found = useful_time(**files)
    assert found.useful_s == pytest.approx(useful)
    assert found.lost_s == pytest.approx(lost)
    assert found.whole_s == pytest.approx(useful + sum(lost.values()))


def test_no_run_no_time() -> None:
    assert useful_time([], [], committed=0).share == 0.0


@pytest.mark.parametrize("seed", range(50))
def test_useful_and_lost_time_add_up_to_the_whole_whatever_the_files_hold(seed: int) -> None:
    rng = random.Random(seed)

    def lines() -> list[dict[str, Any]]:
        return [
            step(n, rng.uniform(0, 100), rng.uniform(0, 30), rng.choice([0.0, 1.0])) for n in range(rng.randrange(9))
        ]

    attempts = sorted((attempt(rng.uniform(0, 50)) for _ in range(3)), key=lambda line: line["timestamp"])
    pauses = rng.random() < 0.5
    if pauses:
        attempts[0]["stopped"] = (attempts[0]["timestamp"] + attempts[1]["timestamp"]) / 2
    met = [
        Interruption(
            rng.uniform(0, 100), rng.uniform(0, 9), hung=rng.random() < 0.5, repeats=rng.random() < 0.5, undone=(1, 3)
        )
        for _ in range(rng.randrange(4))
    ]
    found = useful_time(attempts, lines(), lines(), met, committed=rng.randrange(9), now=rng.choice([None, 200.0]))
    assert found.useful_s + sum(found.lost_s.values()) == pytest.approx(found.whole_s)
    assert set(found.lost_s) <= set(REASONS) and 0.0 <= found.share <= 1.0
