"""A logged step is one line of the metrics file and reaches every sink; an unregistered name reaches none.

A sink that fails costs no step and keeps no other from its values or its end.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf_ray.monitoring import MetricsLog, UnknownMetricError
from rlhf_ray.monitoring.metrics_log import GuardedSink
from rlhf_ray.storage.jsonl import JsonLines


class Sink:
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.seen.append((-1, {}))


def test_a_step_is_one_line_of_valid_json_and_reaches_every_sink(tmp_path: Path) -> None:
    sink = Sink()
    log = MetricsLog(JsonLines(tmp_path / "metrics.jsonl"), [sink], clock=lambda: 12.5)
    log.log(3, {"step": 3, "reward/mean": 1, "loss/policy": float("nan"), "kl/k1": float("-inf")})
    log.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 3, "timestamp": 12.5, "reward/mean": 1.0, "loss/policy": None, "kl/k1": None}
    assert sink.seen == [(3, {"step": 3.0, "reward/mean": 1.0}), (-1, {})]


def test_an_unregistered_metric_is_logged_nowhere(tmp_path: Path) -> None:
    sink = Sink()
    log = MetricsLog(JsonLines(tmp_path / "metrics.jsonl"), [sink])
    with pytest.raises(UnknownMetricError, match="reward/average"):
        log.log(1, {"reward/mean": 1.0, "reward/average": 1.0})
    assert sink.seen == []
    assert not (tmp_path / "metrics.jsonl").exists()


DISK_FULL = OSError("the disk is full")


class Failing(Sink):
    """Raises at these steps, and when it is closed; ``takes_s`` is what each call takes."""

    def __init__(self, *steps: int, takes_s: float = 0.0, error: BaseException = DISK_FULL) -> None:
        super().__init__()
        self.steps, self.takes_s, self.error = steps, takes_s, error
        self.tried: list[int] = []
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.tried.append(step)
        self.now += self.takes_s
        if step in self.steps:
            raise self.error
        super().log(step, values)

    def close(self) -> None:
        raise self.error


def test_a_sink_that_fails_costs_no_step_and_no_other_sink_its_values_or_its_end(
    tmp_path: Path, project_log: io.StringIO
) -> None:
    failing, good = Failing(2, 3), Sink()
    log = MetricsLog(JsonLines(tmp_path / "metrics.jsonl"), [failing, good])
    for step in (1, 2, 3, 4):
        log.log(step, {"reward/mean": 1.0})
    log.close()
    assert [step for step, _ in good.seen] == [1, 2, 3, 4, -1]
    assert [step for step, _ in failing.seen] == [1, 4], "it is tried again at the next step"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert log.lost == {"Failing": 2}
    said = project_log.getvalue().splitlines()
    assert len(said) == 3 and said[0].startswith(
        "Failing failed at step 2 (OSError: the disk is full): training goes on"
    )
    assert said[1] == "Failing failed when it was closed: OSError: the disk is full"
    assert said[2] == "Failing has missed 2 lines of metrics.jsonl"


def test_a_sink_that_wants_to_end_the_process_does_not(tmp_path: Path) -> None:
    log = MetricsLog(JsonLines(tmp_path / "metrics.jsonl"), [Failing(1, error=SystemExit(1)), good := Sink()])
    log.log(1, {"reward/mean": 1.0})
    log.close()
    assert [step for step, _ in good.seen] == [1, -1]


def test_a_sink_that_keeps_failing_is_tried_ever_more_rarely_and_never_given_up() -> None:
    sink = Failing(*range(1, 2001))
    guarded = GuardedSink(sink, sink.clock)
    for step in range(1, 3001):
        sink.now += 1.0
        guarded.log(step, {})
    assert sink.tried[:6] == [1, 2, 3, 4, 6, 10]
    assert 10 <= len([step for step in sink.tried if step <= 2000]) <= 20
    assert sink.tried[-1] == 3000 and guarded.lost < 2301, "once it works it gets every step"


def test_a_sink_that_hangs_takes_a_tenth_of_the_time_at_most() -> None:
    sink = Failing(*range(1, 2001), takes_s=60.0)
    guarded = GuardedSink(sink, sink.clock)
    for step in range(1, 2001):
        sink.now += 1.0
        guarded.log(step, {})
    assert 60.0 * (len(sink.tried) - 3) <= 0.1 * sink.now
