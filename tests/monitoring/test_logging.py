"""From a trainer's values to the registry, the metrics file, TensorBoard and the times of phases."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import IntegrityError
from rlhf_ray.monitoring import PHASES, REGISTRY, JsonLines, Metric, MetricsLog, PhaseClock, UnknownMetricError
from rlhf_ray.monitoring.registry import Registry


class Sink:
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.seen.append((-1, {}))


# ------------------------------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize(
    ("name", "near"),
    [("reward/maen", "reward/mean"), ("loss/polcy", "loss/policy"), ("KL/k1", "kl/k1"), ("grad_norms", "grad_norm")],
)
def test_an_unregistered_name_is_an_error_with_its_nearest_neighbour(name: str, near: str) -> None:
    with pytest.raises(UnknownMetricError, match=rf"metric {name} is not registered \(did you mean {near}\?\)"):
        REGISTRY[name]


@pytest.mark.parametrize("name", ["evaluation/*", "evaluation/", "evaluation", "evaluation/a b", "evaluation/a//b"])
def test_a_family_holds_plain_names_only(name: str) -> None:
    assert name not in REGISTRY
    assert REGISTRY["evaluation/best_of/16"].group == "Evaluation"


def test_every_metric_is_explained_and_every_phase_is_timed() -> None:
    metrics = list(REGISTRY)
    assert len(metrics) > 50
    assert all(metric.help and metric.group and metric.kind in ("gauge", "counter") for metric in metrics)
    assert len({metric.exported_name for metric in metrics}) == len(metrics)
    assert all(f"time/{phase}" in REGISTRY for phase in PHASES if phase != "start")
    assert REGISTRY["updates/skipped"].kind == "counter"


def test_two_names_that_read_alike_in_prometheus_are_refused() -> None:
    with pytest.raises(ValueError, match="clip_fraction_value is registered twice, or reads as another"):
        Registry([Metric("clip_fraction/value", "", "a", "b"), Metric("clip_fraction_value", "", "a", "b")])


# ------------------------------------------------------------------------------------------------------- metrics file


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


@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2), max_size=4
    )
)
@settings(max_examples=30, deadline=None)
def test_lines_come_back_and_a_cut_at_any_byte_costs_only_what_it_touches(lines: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        path = Path(directory) / "lines.jsonl"
        file = JsonLines(path)
        file.extend(lines)
        assert file.read() == lines
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            untouched = whole[:length].count(b"\n")
            assert file.read() == lines[:untouched]
            file.append({"next": 1})
            assert file.read() == [*lines[:untouched], {"next": 1}]


def test_damage_before_the_end_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2 is damaged .* remove the line"):
        JsonLines(path).read()
    path.write_text('{"step": 1}\n17\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:2 is int, not an object"):
        JsonLines(path).read()


def test_voided_lines_move_and_none_is_lost(tmp_path: Path) -> None:
    file, void = JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "a.void.jsonl")
    file.extend({"step": step} for step in range(5))
    assert file.keep(lambda line: line["step"] < 3, void) == 2
    assert file.keep(lambda line: line["step"] < 3, void) == 0
    assert file.read() == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert void.read() == [{"step": 3}, {"step": 4}]


def test_tensorboard_shows_the_same_names_steps_and_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from rlhf_ray.monitoring import TensorBoardWriter

    log = MetricsLog(JsonLines(tmp_path / "metrics.jsonl"), [TensorBoardWriter(tmp_path / "tensorboard")])
    for step in (1, 2):
        log.log(step, {"reward/mean": 0.5 * step, "kl/k1": float("nan")})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert sorted(tags["tensors"] + tags["scalars"]) == ["reward/mean", "step"]
    seen = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("reward/mean")]
    assert seen == [(1, 0.5), (2, 1.0)]


# ------------------------------------------------------------------------------------------------------------- phases


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
