"""A logged step is one line of the metrics file and reaches every sink; an unregistered name reaches none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf_ray.monitoring import MetricsLog, UnknownMetricError
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
