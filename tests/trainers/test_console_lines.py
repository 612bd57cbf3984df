"""The log of a run shows its first steps, its last one, and in between no more than about a hundred, ten seconds apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.trainers import journal
from rlhf_ray.trainers.journal import Journal


def shown(monkeypatch: pytest.MonkeyPatch, *, total: int, seconds: float, terminal: bool = False) -> list[int]:
    """The steps that are shown of a run whose steps take so many seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(journal, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(journal, "stderr", SimpleNamespace(is_terminal=terminal))
    config: Any = SimpleNamespace(kind="ppo", run=SimpleNamespace(seed=0))
    unused: Any = None
    made, steps = Journal(unused, config), []
    for step in range(1, total + 1):
        clock.now += seconds
        if made._is_said(step, total):
            steps.append(step)
    return steps


def test_quick_steps_are_shown_ten_seconds_apart_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, total=4, seconds=0.1) == [1, 2, 3, 4]
    assert shown(monkeypatch, total=60, seconds=1.0) == [*range(1, 11), 20, 30, 40, 50, 60]
    assert shown(monkeypatch, total=60, seconds=1.0, terminal=True) == list(range(1, 61))


def test_slow_steps_are_shown_about_a_hundred_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, total=60, seconds=20.0) == list(range(1, 61))
    assert shown(monkeypatch, total=5000, seconds=20.0) == [1, *range(100, 5001, 100)]
