"""The registry knows every metric by name, explains it, and refuses names that are wrong or read alike."""

from __future__ import annotations

import pytest

from rlhf_ray.monitoring import PHASES, REGISTRY, Metric, UnknownMetricError
from rlhf_ray.monitoring.registry import Registry


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
