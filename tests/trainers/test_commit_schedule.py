"""When a checkpoint is due: as the config says, or by the length of the run, its time, and what a commit costs."""

from __future__ import annotations

import itertools

import pytest

from rlhf_ray.trainers.commit_schedule import CommitSchedule


def commits(
    every: int | None, total: int, *, step_s: float = 1.0, commit_s: float = 0.0, beside_s: float = 0.0, start: int = 0
) -> list[int]:
    """The steps after which a run commits; each stops it for ``commit_s``, and takes ``beside_s`` of a processor."""
    now = [50.0]
    schedule = CommitSchedule(every, total, start, clock=lambda: now[0])
    steps = []
    for step in range(start + 1, total + 1):
        now[0] += step_s
        if schedule.is_due(step):
            now[0] += commit_s
            schedule.saved(step, commit_s)
            schedule.wrote(beside_s)
            steps.append(step)
    return steps


def test_a_number_is_kept_to_exactly() -> None:
    assert commits(3, 10, commit_s=1e6) == [3, 6, 9]
    assert commits(3, 10, start=4) == [6, 9]


def test_zero_commits_nothing_on_the_way() -> None:
    assert commits(0, 10, step_s=1e6) == []
    assert not CommitSchedule(0, 10).commits_on_the_way
    assert CommitSchedule(1, 10).commits_on_the_way and CommitSchedule(None, 10).commits_on_the_way


def test_without_a_number_a_run_commits_after_every_tenth_of_its_steps() -> None:
    assert commits(None, 100) == list(range(10, 101, 10))
    assert commits(None, 25) == [3, 6, 9, 12, 15, 18, 21, 24]
    assert commits(None, 3) == [1, 2, 3]
    assert commits(None, 100, start=15) == [25, 35, 45, 55, 65, 75, 85, 95]


def test_and_no_later_than_a_quarter_of_an_hour_after_the_last() -> None:
    assert commits(None, 10_000, step_s=600.0)[:4] == [2, 4, 6, 8]


@pytest.mark.parametrize("commit_s", [0.5, 10.0, 2000.0])
def test_and_for_at_most_a_tenth_of_its_time_after_the_first(commit_s: float) -> None:
    steps = commits(None, 10_000, step_s=1.0, commit_s=commit_s)
    assert commit_s * (len(steps) - 1) <= 0.1 * (10_000 + commit_s * len(steps)) and steps[0] <= 1000


@pytest.mark.parametrize("commit_s, beside_s", [(0.4, 0.0), (0.0, 0.4), (0.05, 0.35)])
def test_commits_after_the_first_take_a_hundredth_of_the_time_so_far(commit_s: float, beside_s: float) -> None:
    steps = commits(None, 1300, step_s=0.1, commit_s=commit_s, beside_s=beside_s)
    assert steps[0] == 130 and len(steps) == 3, "two are 0.8 s, due after 80 s; three are 1.2 s, due after 120 s"
    assert abs(800 - steps[1]) <= 10 and abs(1200 - steps[2]) <= 10


def test_but_whatever_they_take_one_comes_a_quarter_of_an_hour_after_the_last() -> None:
    steps = commits(None, 100_000, commit_s=1.0, beside_s=60.0)
    assert len(steps) > 100 and max(late - early for early, late in itertools.pairwise(steps)) <= 900
