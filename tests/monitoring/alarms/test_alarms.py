"""Conditions over readings against slow references, and which of the alarms that are true are said."""

from __future__ import annotations

import ast
import inspect
import random
from dataclasses import replace
from pathlib import Path

import pytest

import rlhf_ray.monitoring.alarms
from rlhf_ray.monitoring import REGISTRY
from rlhf_ray.monitoring.alarms.alarm import Alarm, holding, in_order
from rlhf_ray.monitoring.alarms.conditions import Above, Below, Changed, Counted, Silent
from rlhf_ray.monitoring.alarms.readings import Event, Readings, State
from rlhf_ray.monitoring.registry import Metric, Registry
from rlhf_ray.monitoring.run_readings import add_line, of_lines, with_heartbeat
from rlhf_ray.monitoring.stalls import Limits, OpenPhase
from rlhf_ray.monitoring.vitals import Progress, room_needed_gb, vitals


def test_a_condition_says_what_a_look_at_every_second_says() -> None:
    draw = random.Random(0)
    for _ in range(300):
        times = sorted(draw.sample(range(60), draw.randint(1, 6)))
        state = [(float(at), draw.choice([None, 1.0, 2.0, 3.0])) for at in times]
        readings = Readings({"entropy": state}, {"groups/lost": [(at, 1.0) for at, value in state if value]})
        now, held = draw.randrange(60), draw.choice([0, 5, 20])

        def at(second: int, state: list[tuple[float, float | None]] = state) -> float | None:
            return next((value for when, value in reversed(state) if when <= second), None)

        every = [at(second) for second in range(now - held, now + 1)]
        known = every[0] is not None and every[-1] is not None
        seen = [value for value in every if value is not None]
        assert Above("entropy", 1.5, held).holds(readings, now) == (known and min(seen) > 1.5)
        assert Below("entropy", 2.5, held).holds(readings, now) == (known and max(seen) < 2.5)
        counted = sum(1 for when, value in state if value and now - 10 < when <= now)
        assert Counted("groups/lost", 10, 1).holds(readings, now) == (counted > 1)
        before, after = at(now - held), at(now)
        drifted = before is not None and after is not None and (after > 2 * before or after < before / 2)
        assert Changed("entropy", 2.0, held).holds(readings, now) == drifted
        assert readings.since(now - 30).value("entropy", now) == readings.value("entropy", now)


def test_an_age_grows_until_it_is_read_again_and_nothing_at_0_grows() -> None:
    readings = Readings({"age/step": [(10.0, 5.0), (40.0, 0.0)], "limit/step": [(10.0, 30.0)]})
    assert [readings.value("age/step", at) for at in (5, 10, 39, 45)] == [None, 5.0, 34.0, 0.0]
    assert [Above("age/step", "limit/step").holds(readings, at) for at in (9, 34, 36, 41)] == [
        False,
        False,
        True,
        False,
    ]
    assert "34, above 30 (limit/step)" in Above("age/step", "limit/step").reading(readings, 39)


def test_a_run_that_ended_in_order_is_not_silent() -> None:
    for value, silent in ((1e9, True), (-1e9, False)):
        assert Silent("run/started", 60).holds(Readings({"run/started": [(0.0, value)]}), 61) == silent
        assert not Silent("run/started", 60).holds(Readings({"run/started": [(0.0, value)]}), 60)


def alarm(name: str, severity: str = "warning", by: tuple[str, ...] = (), step: int = 0) -> Alarm:
    return Alarm(name, severity, Above(name, 0.0), "", "", by, step)  # type: ignore[arg-type]


def test_an_alarm_is_left_out_while_another_explains_it_and_advice_while_there_is_any() -> None:
    alarms = in_order(
        [alarm("advice", "advice"), alarm("whole", "critical", ("phase",)), alarm("phase", by=("call",)), alarm("call")]
    )
    assert [one.name for one in alarms] == ["call", "phase", "whole", "advice"]

    def said(*true: str, step: float = 2.0) -> list[str]:
        states = {name: [(0.0, 1.0)] for name in true} | {"step": [(0.0, step)]}
        return [one.name for one in holding(alarms, Readings(states), 1.0)]

    assert said("advice") == ["advice"] and said("advice", "phase") == ["phase"]
    assert said("call", "phase", "whole") == ["whole", "call"], (
        "what is explained explains nothing, and the gravest is first"
    )
    assert said() == []
    late = [alarm("kl", "advice", step=2)]
    for step, expected in ((1.0, []), (2.0, ["kl"])):
        readings = Readings({"kl": [(0.0, 1.0)], "step": [(0.0, step)]})
        assert [one.name for one in holding(late, readings, 1.0)] == expected


def test_an_alarm_that_explains_itself_or_is_explained_by_none_is_refused() -> None:
    for wrong in ([alarm("a", by=("b",)), alarm("b", by=("a",))], [alarm("a", by=("nobody",))]):
        with pytest.raises(ValueError, match="explained by itself, or by one that is not there"):
            in_order(wrong)


def test_every_alarm_asks_for_metrics_of_the_registry_and_is_carried_by_one_of_them() -> None:
    carried = [metric for metric in REGISTRY if metric.alarm]
    assert len(carried) == len({metric.alarm.name for metric in carried if metric.alarm}) >= 20
    for metric in carried:
        assert metric.alarm is not None and metric.name in metric.alarm.condition.metrics
        assert all(name in REGISTRY and not REGISTRY[name].is_family for name in metric.alarm.condition.metrics)
        assert metric.alarm.meaning[-1] != "." != metric.alarm.way_out[-1]
        kinds = {REGISTRY[name].kind for name in metric.alarm.condition.metrics if "deaths" not in name}
        assert kinds == {"counter"} if isinstance(metric.alarm.condition, Counted) else kinds == {"gauge"}
    lost = replace(next(iter(carried)), alarm=alarm("x", by=("nobody",)))
    with pytest.raises(ValueError, match="alarm x"):
        assert Registry([lost, Metric("a", "", "b", "c")]).alarms


def test_alarms_read_no_file_and_no_clock() -> None:
    directory = Path(inspect.getfile(rlhf_ray.monitoring.alarms)).parent
    for module in directory.glob("*.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(module.read_text()))
            for name in (
                [one.name for one in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not {name for name in imported if name.partition(".")[0] in {"time", "os", "pathlib", "io", "ray"}}


def test_lines_tell_states_until_the_next_attempt_and_events_also_where_they_are_void() -> None:
    lines = [
        {"step": 1, "timestamp": 10.0, "entropy": 0.5, "updates/skipped": 0.0, "not/registered": 1.0},
        {"step": 2, "timestamp": 20.0, "entropy": None, "updates/skipped": 2.0},
        {"step": 3, "timestamp": 30.0, "entropy": 0.25},
    ]
    readings = of_lines(lines, [{"step": 9, "timestamp": 5.0, "entropy": 9.0, "updates/skipped": 4.0}], [1.0, 35.0])
    assert [readings.value("entropy", at) for at in (5, 10, 20, 30, 35)] == [None, 0.5, None, 0.25, None]
    assert readings.counted("updates/skipped", 0, 40) == 6.0 and list(readings.events) == ["updates/skipped"]
    told = with_heartbeat(readings, 40.0, {"entropy": 0.75}, {"groups/lost": [(39.0, 1.0)]})
    assert told.value("entropy", 40) == 0.75 and told.counted("groups/lost", 0, 40) == 1.0
    assert told.counted("updates/skipped", 0, 40) == 6.0


def test_of_lines_all_is_kept_that_an_alarm_reads_and_nothing_else() -> None:
    """The alarms say the same as from every value of every line."""
    draw, said = random.Random(0), set[str]()
    for _ in range(60):
        share = draw.random()
        values = {metric.name: draw.choice([0.0, 0.5, 1e3]) for metric in REGISTRY if draw.random() < share}
        lines = [{"step": step, "timestamp": 60.0 * step, **values} for step in range(1, draw.randint(2, 40))]
        states: dict[str, list[State]] = {}
        events: dict[str, list[Event]] = {}
        for line in lines:
            add_line(line, line["timestamp"], states, events)
        now, few = lines[-1]["timestamp"] + draw.choice([0.0, 50.0, 1000.0]), of_lines(lines)
        told = [[(one.name, one.condition.reading(readings, now)) for one in REGISTRY.alarms if one.is_true(readings, now)]
                for readings in (few, Readings(states, events))]  # fmt: skip
        assert told[0] == told[1]
        said |= {name for name, _ in told[0]}
        assert {*few.states, *few.events} <= {name for one in REGISTRY.alarms for name in one.metrics}
    assert len(said) > len(REGISTRY.alarms) / 2, "else the test shows nothing"


LIMITS = Limits(floor_s=10.0, unknown_s=600.0)


def progress(**changes: object) -> Progress:
    well = Progress(100.0, 90.0, (2.0, 4.0, 3.0), (OpenPhase("update", 95.0, 1.0),), 50.0, None)
    return replace(well, **changes)  # type: ignore[arg-type]


def test_limits_are_six_medians_and_at_least_the_floor_and_none_before_a_step_has_ended() -> None:
    values = vitals(progress(), LIMITS, 900.0)
    assert (values["age/step"], values["limit/step"]) == (10.0, 20.0)
    assert (values["age/phase"], values["limit/phase"]) == (5.0, 10.0)
    assert (values["age/commit"], values["limit/commit"]) == (50.0, 1800.0)
    assert values["age/reward_call"] == 0.0 and "limit/reward_call" not in values
    first = vitals(progress(last_step_at=None), LIMITS, 900.0)
    assert first == {"age/reward_call": 0.0}, "no limit is known, and no age that would be held against one"
    assert vitals(progress(steps_s=(10.0,) * 30), LIMITS, 900.0)["limit/step"] == 60.0


def test_what_belongs_to_no_usual_step_makes_it_no_more_overdue() -> None:
    evaluation, unknown = OpenPhase("evaluation", 20.0, 30.0), OpenPhase("first evaluation", 20.0, None)
    assert vitals(progress(phases=[evaluation]), LIMITS, 900.0)["limit/step"] == 20.0 + 180.0
    values = vitals(progress(phases=[unknown]), LIMITS, 900.0)
    assert values["limit/step"] == 620.0 and "age/phase" not in values
    nested = vitals(progress(phases=[evaluation, OpenPhase("self-check", 30.0, 1.0)]), LIMITS, 900.0)
    assert (nested["age/phase"], nested["limit/phase"]) == (70.0, 10.0), "the most overdue"


def test_a_call_to_the_reward_source_has_a_limit_of_its_own() -> None:
    waiting = progress(phases=[OpenPhase("scoring", 20.0, 1.0)], reward_call_s=80.0)
    assert vitals(waiting, LIMITS, 900.0)["limit/phase"] == 10.0
    values = vitals(replace(waiting, usual_reward_call_s=3.0), LIMITS, 900.0)
    assert (values["age/reward_call"], values["limit/reward_call"]) == (80.0, 18.0) and "limit/phase" not in values
    evaluating = replace(waiting, usual_reward_call_s=3.0, phases=[OpenPhase("evaluation", 20.0, 30.0)])
    assert "limit/reward_call" not in vitals(evaluating, LIMITS, 900.0), "an evaluation has more scored in a call"


@pytest.mark.parametrize(("every", "limit"), [(None, 1800.0), (0, None), (10, 600.0), (1000, 6000.0)])
def test_a_commit_is_old_after_two_intervals(every: int | None, limit: float | None) -> None:
    assert vitals(progress(commit_every=every), LIMITS, 900.0).get("limit/commit") == limit
    evaluating = progress(commit_every=every, phases=[OpenPhase("evaluation", 20.0, 30.0)])
    assert vitals(evaluating, LIMITS, 900.0).get("limit/commit") == (None if limit is None else limit + 180.0)
    assert room_needed_gb(0) == 0.1 and room_needed_gb(10**10) == 20.0


def test_a_step_that_is_longer_than_the_interval_of_commits_makes_none_overdue() -> None:
    assert vitals(progress(steps_s=(2000.0,)), LIMITS, 900.0)["limit/commit"] == 4000.0
