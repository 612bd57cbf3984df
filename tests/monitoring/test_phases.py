"""The times of a step, phase by phase."""

from __future__ import annotations

import io

import pytest

from rlhf_ray.monitoring import PhaseClock, UnknownMetricError
from rlhf_ray.monitoring.phases import BETWEEN


def test_a_phase_costs_what_passed_inside_it_and_a_step_what_passed_in_all() -> None:
    now, entered = [100.0], []
    clock = PhaseClock(entered.append, clock=lambda: now[0])

    def spend(phase: str, seconds: float) -> None:
        with clock.phase(phase):
            now[0] += seconds

    spend("rollout", 2.0)
    now[0] += 0.5
    spend("update", 3.0)
    spend("rollout", 1.0)
    assert clock.take() == {"time/rollout": 3.0, "time/update": 3.0, "time/step": 6.5}
    assert entered == ["rollout", "update", "rollout"]
    with pytest.raises(RuntimeError), clock.phase("scoring"):
        now[0] += 4.0
        raise RuntimeError("a failed phase has taken its time too")
    assert clock.take() == {"time/scoring": 4.0, "time/step": 4.0}
    with pytest.raises(UnknownMetricError, match="time/sleeping"):
        spend("sleeping", 1.0)


def test_whoever_is_told_of_a_phase_and_fails_keeps_it_from_nothing(project_log: io.StringIO) -> None:
    def fail(phase: str) -> None:
        raise ConnectionError("no agent")

    clock, ran = PhaseClock(fail), []
    for phase in ("rollout", "update"):
        with clock.phase(phase):
            ran.append(phase)
    assert ran == ["rollout", "update"] and clock.take().keys() == {"time/rollout", "time/update", "time/step"}
    assert project_log.getvalue().count("could not be shown") == 1


def test_other_work_in_a_phase_says_nothing_of_how_long_the_usual_takes() -> None:
    now = [100.0]
    clock = PhaseClock(clock=lambda: now[0])
    with clock.phase("evaluation", "self-check"):
        now[0] += 2.0
        assert [(one.name, one.usual_s) for one in clock.open()] == [("self-check", None)]
    with clock.phase("evaluation"):
        now[0] += 3.0
        assert [(one.name, one.usual_s) for one in clock.open()] == [("evaluation", None)]
    assert (clock.durations.median("self-check"), clock.durations.median("evaluation")) == (2.0, 3.0)
    assert clock.take()["time/evaluation"] == 5.0


def test_something_is_open_at_any_moment_and_what_fails_says_nothing_of_how_long_it_takes() -> None:
    now = [100.0]
    clock = PhaseClock(clock=lambda: now[0])
    now[0] += 2.0
    assert [(one.name, one.entered_at, one.usual_s) for one in clock.open()] == [(BETWEEN, 100.0, None)]
    for seconds in (1.0, 3.0):
        with clock.phase("update"), clock.part("inner"):
            now[0] += seconds
            assert [(one.name, one.entered_at) for one in clock.open()] == [
                ("update", now[0] - seconds),
                ("inner", now[0] - seconds),
            ]
    with pytest.raises(RuntimeError), clock.phase("update"):
        now[0] += 1000.0
        raise RuntimeError("a call that met its deadline")
    assert [(one.name, one.entered_at, one.usual_s) for one in clock.open()] == [(BETWEEN, now[0], 0.0)]
    assert clock.durations.median("update") == 2.0
    assert clock.take()["time/update"] == 1004.0 and "time/inner" not in clock.take()
