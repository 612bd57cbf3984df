"""What is said about when a metric is there is about metrics that are registered, and stands in the panels."""

from __future__ import annotations

import re

import pytest

from rlhf_ray.monitoring import REGISTRY
from rlhf_ray.monitoring.appearance import GPU, WHEN, appears, when
from rlhf_ray.monitoring.dashboards import BOARDS, dashboard, expression


def test_every_pattern_matches_a_metric_and_each_of_these_metrics_one_pattern() -> None:
    matched = {pattern: {metric.name for metric in REGISTRY if re.fullmatch(pattern, metric.name)} for pattern in WHEN}
    assert all(matched.values()), matched
    assert sum(map(len, matched.values())) == len(set().union(*matched.values()))
    assert when(REGISTRY["kl/k1"]) is None and when(REGISTRY["time/step"]) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('rlhf_scoring_reloads_total{instance=~"x"}', "after a new version of a model"),
        ('histogram_quantile(0.5, rate(rlhf_scoring_refusal_seconds_bucket{instance=~"x"}[1m]))', "after a full queue"),
        ("ray_node_gram_used", GPU),
        ("ray_node_mem_used", None),
        ('rlhf_scoring_waiting_items{instance=~"x"}', None),
        ("ray_rlhf_reward_failed_tries_total", "after a reward source that failed"),
        ("ray_rlhf_loss_kl", WHEN["loss/kl"]),
        ("ray_rlhf_loss_policy", None),
        ("ray_rlhf_no_such_metric", None),
        ('ALERTS{alertstate="firing", run=~"x"}', "while an alarm holds"),
    ],
)
def test_an_expression_is_there_when_its_metric_is(text: str, reason: str | None) -> None:
    assert appears(text) == reason


def test_a_panel_that_may_be_empty_says_when_it_is_not() -> None:
    texts = {
        target["expr"]: panel["description"]
        for board in BOARDS
        for panel in dashboard(board)["panels"]
        for target in panel.get("targets", ())
    }
    for metric in REGISTRY:
        reason = when(metric)
        assert reason is None or f"Only {reason}" in texts[expression(metric)]
    assert any(text.endswith("Only after a full queue") for text in texts.values())
