"""What a run logs reaches Ray's metrics agent under the names that the dashboard queries."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Iterator

import pytest

from rlhf_ray import environment
from rlhf_ray.monitoring.dashboards import expression
from rlhf_ray.monitoring.registry import PHASES, RAY_PREFIX, REGISTRY

SECONDS = 60


@pytest.fixture(scope="module")
def agent() -> Iterator[str]:
    """Address of the metrics agent of a Ray node that lives as long as this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in {**environment.for_process(), "RAY_metrics_report_interval_ms": "500"}.items():
            patch.setenv(name, value)
        import ray

        ray.init(
            address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False
        )
        try:
            node = ray.nodes()[0]
            yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        finally:
            ray.shutdown()


def series(agent: str, name: str, label: str) -> dict[str, float]:
    """The series ``name`` at the agent now, by one of their labels."""
    with urllib.request.urlopen(agent, timeout=10) as response:
        lines = response.read().decode().splitlines()
    values = {}
    for line in lines:
        match = re.match(rf'{name}{{(?=[^}}]*run="demo")[^}}]*\b{label}="(.*?)".*}} (.+)', line)
        if match:
            values[match[1]] = float(match[2])
    return values


def assert_reaches(agent: str, name: str, label: str, expected: dict[str, float]) -> None:
    deadline = time.monotonic() + SECONDS
    while (seen := series(agent, name, label)) != expected:
        assert time.monotonic() < deadline, f"{name} at Ray's metrics agent is {seen}, not {expected}"
        time.sleep(0.1)


def queried_series(name: str) -> str:
    """The series that the dashboard asks Prometheus for."""
    match = re.search(rf"{RAY_PREFIX}rlhf_\w+", expression(REGISTRY[name]))
    assert match is not None
    return match.group()


def test_gauges_counters_and_the_phase_stand_at_the_agent(agent: str) -> None:
    from rlhf_ray.monitoring.ray_export import PhaseGauge, RayExporter

    phase = PhaseGauge("demo")
    driver, critic = RayExporter("demo"), RayExporter("demo", role="critic", rank=1)
    driver.log(1, {"reward/mean": 0.25, "updates/skipped": 0.0, "evaluation/gold_mean": 0.5})
    driver.log(2, {"reward/mean": 0.75, "updates/skipped": 2.0})
    driver.log(3, {"updates/skipped": 3.0})
    critic.log(2, {"reward/mean": -1.0, "updates/skipped": 1.0})
    phase.enter("rollout")
    phase.enter("update")

    assert_reaches(agent, queried_series("reward/mean"), "role", {"driver": 0.75, "critic": -1.0})
    assert_reaches(agent, queried_series("reward/mean"), "rank", {"0": 0.75, "1": -1.0})
    assert_reaches(agent, queried_series("updates/skipped"), "role", {"driver": 5.0, "critic": 1.0})
    assert_reaches(agent, "ray_rlhf_evaluation_gold_mean", "role", {"driver": 0.5})
    assert_reaches(agent, "ray_rlhf_phase", "phase", {name: float(name == "update") for name in PHASES})


def test_gauges_that_hold_stay_at_the_agent_and_one_that_is_not_finite_any_more_goes(agent: str) -> None:
    """Ray forgets a gauge twice its report interval after it was last set: a second here."""
    from rlhf_ray.monitoring.ray_export import PhaseGauge, RayExporter

    exporter, phase = RayExporter("demo", role="held"), PhaseGauge("held")
    exporter.log(1, {"time/step": 1.0, "loss/policy": 0.5})
    exporter.log(1, {"evaluation/gold": 0.25})
    exporter.log(2, {"time/step": 2.0})
    exporter.log(2, {"run/started": 1.0, "age/step": 3.0, "age/phase": 5.0})
    exporter.log(2, {"run/started": 1.0, "age/step": 4.0})

    def held(name: str) -> float | None:
        return series(agent, queried_series(name), "role").get("held")

    assert_reaches(agent, queried_series("time/step"), "role", {"held": 2.0})
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        exporter.again()
        phase.again()
        time.sleep(0.2)
    deadline = time.monotonic() + SECONDS
    while (held("time/step"), held("evaluation/gold"), held("age/step")) != (2.0, 0.25, 4.0):
        assert time.monotonic() < deadline, (
            "what is told again and again is held, but where this process waits for its turn"
        )
        exporter.again()
    assert held("loss/policy") is None
    assert held("age/phase") is None, "the last look knew of no phase that is overdue"
    deadline = time.monotonic() + SECONDS
    while held("time/step") is not None:
        assert time.monotonic() < deadline, "a gauge that is not set again stays: the rest of this test shows nothing"
        time.sleep(0.2)


def test_a_phase_that_nobody_knows_is_refused(agent: str) -> None:
    from rlhf_ray.monitoring.ray_export import PhaseGauge

    with pytest.raises(ValueError, match="sleeping is not a phase: choose one of start, rollout"):
        PhaseGauge("demo").enter("sleeping")


def test_the_object_store_of_ray_counts_once_for_all_processes_that_map_it(agent: str) -> None:
    import numpy
    import ray

    from rlhf_ray.monitoring.memory import memory_use

    before = memory_use([os.getpid()])
    kept = ray.put(numpy.ones(2_500_000))
    after = memory_use([os.getpid()])
    assert after.object_store_gb - before.object_store_gb == pytest.approx(0.02, rel=0.05)
    assert after.processes >= 4, "driver, raylet, control service and agent"
    assert ray.get(kept, timeout=10).sum() == 2_500_000
