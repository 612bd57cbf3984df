"""Prometheus' rules are those of the alarms, and hold when the evaluator says that the alarms do."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from rlhf_ray.monitoring import REGISTRY
from rlhf_ray.monitoring.alarms.conditions import GAP_S, Above, Below, Changed, Counted, Either
from rlhf_ray.monitoring.alarms.readings import AGE, Event, Readings, State
from rlhf_ray.monitoring.rules import render_rules, rules
from tests.monitoring.alarms import promtool
from tests.monitoring.alarms.promtool import RULES, SCRAPE_S, Case, ages

needs_promtool = pytest.mark.skipif(promtool.PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
IN_MAKE_TEST, IN_ALL = 3, 60
"""Drawn cases."""


def test_the_committed_rules_are_what_the_registry_makes() -> None:
    assert RULES.read_text() == render_rules(), (
        "the alarms have changed: run python -m rlhf_ray.monitoring.rules deploy/monitoring/rlhf_ray_rules.yml"
    )


def test_every_alarm_is_a_rule_with_its_texts_after_those_that_explain_it() -> None:
    group, _ = rules()["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert sorted(names) == sorted(metric.alarm.name for metric in REGISTRY if metric.alarm)
    for rule, alarm in zip(group["rules"], REGISTRY.alarms, strict=True):
        assert rule["labels"] == {"severity": alarm.severity}
        assert alarm.meaning in rule["annotations"]["summary"] and rule["annotations"]["description"] == alarm.way_out
        assert all(names.index(other) < names.index(alarm.name) for other in alarm.explained_by)
        if alarm.severity == "advice":
            assert "critical" not in [one["labels"]["severity"] for one in group["rules"][names.index(alarm.name) :]]


def steady(end: int, **states: list[State]) -> dict[str, list[State]]:
    """States of a run that is well, up to ``end``; keyword arguments name others with ``__`` for ``/``."""
    well: dict[str, list[State]] = {"run/started": [(at, 1e9) for at in range(0, end + 1, SCRAPE_S)], "step": [(0, 50)]}
    return well | {name.replace("__", "/"): known for name, known in states.items()}


def known_cases() -> list[Case]:
    """What went wrong in Prometheus before, and what the alarms promise."""
    overdue = {"age__step": ages("age/step", [0, 300], 1500), "limit__step": [(10.0, 60.0)]}
    silent = {"run/started": [(float(at), 1e9) for at in range(0, 601, SCRAPE_S)], "step": [(0.0, 5.0)]}
    ended: list[State] = [*silent["run/started"][:-1], (600.0, -1e9)]
    again = [at for at in range(0, 1201, SCRAPE_S) if not 600 < at < 900]
    resumed: list[State] = [(float(at), 1e9 if at <= 600 else 2e9) for at in again]
    first_step: dict[str, list[State]] = {
        "step": [(0.0, 1.0)],
        "entropy": [(0.0, 0.0)],
        "kl/k1": [(0.0, 99.0)],
        "explained_variance": [(0.0, -1.0)],
        "clip_fraction": [(0.0, 1.0)],
        "age/step": ages("age/step", [0], 900),
        "age/phase": ages("age/phase", [0], 900),
    }
    return [
        Case("born high", Readings(steady(930), {"updates/skipped": [(300.0, 5.0)]}), (270, 330, 870, 930)),
        Case("healed at once", Readings(steady(930), {"rollout/engine_deaths": [(301.0, 1.0)]}), (330, 600, 930)),
        Case("a long hang", Readings(steady(1500, **overdue)), (30, 90, 270, 330, 390, 900, 1500)),
        Case("the driver is gone", Readings(silent), (600, 660, 690, 900, 1200)),
        Case("it has ended in order", Readings({**silent, "run/started": ended}), (600, 690, 900, 1200)),
        Case("it was resumed", Readings({**silent, "run/started": resumed}), (600, 690, 900, 960, 1200, 1290)),
        Case("the first step", Readings({**steady(900), **first_step}), (30, 330, 900)),
        Case(
            "advice waits for alarms",
            Readings(steady(1530, kl__k1=[(0.0, 50.0)]), {"updates/skipped": [(900.0, 1.0)]}),
            (300, 330, 870, 900, 1470, 1500, 1530),
        ),
    ]


def drawn_case(number: int) -> Case:
    """An alarm or three, with values around their limits, and gaps in which Prometheus sees nothing."""
    draw = random.Random(number)
    chosen = draw.sample(REGISTRY.alarms, 3)
    end = 1200 + max((one.condition.within_s for one in chosen if isinstance(one.condition, Changed)), default=0)
    states, missing = steady(end), dict[str, list[tuple[int, int]]]()
    events: dict[str, list[Event]] = {}
    for alarm in chosen:
        parts = [alarm.condition]
        if isinstance(alarm.condition, Either):
            parts = [alarm.condition.first, alarm.condition.second]
        for part in parts:
            if isinstance(part, Counted):
                times = sorted(draw.sample(range(10, end, SCRAPE_S), draw.randint(1, 3)))
                events[part.metric] = [(float(at), float(draw.randint(1, 5))) for at in times]
            elif isinstance(part, Above | Below) and part.metric.startswith(AGE):
                begins = [0, *sorted(draw.sample(range(10, end, SCRAPE_S), draw.randint(0, 4)))]
                states[part.metric] = ages(part.metric, begins, end)
                assert isinstance(part.limit, str)
                states[part.limit] = [(float(draw.choice([0, 300])), float(draw.choice([45, 125, 605])))]
            elif isinstance(part, Above | Below | Changed):
                limit = part.limit if isinstance(part, Above | Below) and not isinstance(part.limit, str) else 1.0
                states[part.metric], missing[part.metric] = drawn_state(draw, limit, end)
                if isinstance(part, Above | Below) and isinstance(part.limit, str):
                    states[part.limit] = [(0.0, 1.0)]
    moments = sorted(draw.sample(range(30, end + 1, 30), 8))
    return Case(f"drawn {number}", Readings(states, events), moments, missing)


def drawn_state(draw: random.Random, limit: float, end: int) -> tuple[list[State], list[tuple[int, int]]]:
    """A state around a limit, and gaps between its changes in which nothing is seen of it."""
    times = [0, *sorted(draw.sample(range(10, end, SCRAPE_S), draw.randint(0, 5)))]
    state: list[State] = [(float(at), limit + draw.choice([-3.0, -0.5, 0.5, 3.0, 9.0])) for at in times]
    gaps = []
    for first, after in zip(times, [*times[1:], end], strict=True):
        if after - first > 3 * GAP_S:
            begin = draw.randrange(first + SCRAPE_S, after - GAP_S - SCRAPE_S, SCRAPE_S)
            gaps.append((begin, begin + GAP_S - SCRAPE_S))
    return state, gaps


@needs_promtool
def test_prometheus_reads_the_rules() -> None:
    subprocess.run([str(promtool.PROMTOOL), "check", "rules", str(RULES)], check=True, capture_output=True, timeout=60)


@needs_promtool
def test_prometheus_holds_known_alarms_to_be_true_when_the_evaluator_does(tmp_path: Path) -> None:
    assert promtool.run([*known_cases(), *map(drawn_case, range(IN_MAKE_TEST))], tmp_path) == ""


@needs_promtool
@pytest.mark.long
def test_prometheus_holds_every_alarm_to_be_true_when_the_evaluator_does(tmp_path: Path) -> None:
    cases = [drawn_case(number) for number in range(IN_MAKE_TEST, IN_ALL)]
    seen = set().union(*(case.holding(at) for case in cases for at in case.moments))
    assert {"RunSilent"} == {alarm.name for alarm in REGISTRY.alarms} - seen
    assert promtool.run(cases, tmp_path) == ""


@needs_promtool
def test_a_rule_that_says_something_else_is_found(tmp_path: Path) -> None:
    other = tmp_path / "rules.yml"
    other.write_text(RULES.read_text().replace("offset 600s", "offset 660s"))
    assert "UpdatesSkipped" in promtool.run(known_cases()[:1], tmp_path, other)


def test_the_evaluator_says_of_known_cases_what_they_promise() -> None:
    said = {case.name: [case.holding(at) for at in case.moments] for case in known_cases()}
    skipped, lost, none, advice = {"UpdatesSkipped"}, {"EngineLost"}, set[str](), {"FarFromReference"}
    late = {"StepOverdue"}
    assert said["born high"] == [none, skipped, skipped, none]
    assert said["healed at once"] == [lost, lost, none]
    assert said["a long hang"] == [none, late, late, none, late, late, late]
    assert said["the driver is gone"] == [none, none, *[{"RunSilent"}] * 3]
    assert said["it has ended in order"] == [none] * 4
    assert said["it was resumed"] == [none, {"RunSilent"}, none, none, none, {"RunSilent"}]
    assert said["the first step"] == [none] * 3
    assert said["advice waits for alarms"] == [advice, advice, advice, skipped, skipped, advice, advice]
