"""What is said about when a metric is there is about metrics that are registered, and stands in the panels."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from rlhf_ray.algorithms.advantages import Gae, RewardToGo
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.algorithms.shaping import RewardShaping
from rlhf_ray.monitoring import REGISTRY
from rlhf_ray.monitoring.appearance import GPU, WHEN, when
from rlhf_ray.monitoring.dashboards import BOARDS, dashboard, expression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason
from tests.monitoring.alarms.prometheus import appears


def test_every_pattern_matches_a_metric_and_each_of_these_metrics_one_pattern() -> None:
    matched = {pattern: {metric.name for metric in REGISTRY if re.fullmatch(pattern, metric.name)} for pattern in WHEN}
    assert all(matched.values()), matched
    assert sum(map(len, matched.values())) == len(set().union(*matched.values()))
    for name in ("kl/coefficient", "loss/policy", "grad_norm/policy", "clip_fraction", "advantages/mean", "time/step"):
        assert when(REGISTRY[name]) is None


def test_what_a_critic_or_a_reference_brings_is_not_there_without_it() -> None:
    """By what the preparation of a batch returns: with them, and with neither."""
    parts = Preparation(RewardShaping(), RewardToGo(1.0), None)
    batch = TrajectoryBatch.from_sequences(
        [[1, 2, 3]], action_mask=[[False, True, True]], log_probs=[[math.nan, -1.0, -2.0]],
        rollout_log_probs=[[math.nan, -1.0, -2.0]], score=[3.0], finish_reason=[FinishReason.STOP],
    )  # fmt: skip
    with_both = batch.with_columns(
        values=torch.tensor([0.0, 0.5, 1.0]), reference_log_probs=torch.tensor([math.nan, -1.5, -1.0])
    )
    _, few = parts(batch, kl_coefficient=0.0, moments=RunningMoments())
    _, more = replace(parts, estimator=Gae(1.0, 0.95))(with_both, kl_coefficient=0.0, moments=RunningMoments())
    assert all(when(REGISTRY[name]) is None for name in few)
    assert {name: when(REGISTRY[name]) for name in more.keys() - few.keys()} == {
        "kl/k1": "with a reference", "kl/k3": "with a reference", "returns/mean": "with a critic",
        "values/mean": "with a critic", "explained_variance": "with a critic",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('rlhf_scoring_reloads_total{instance=~"x"}', "after a new version of a model"),
        ('histogram_quantile(0.5, rate(rlhf_scoring_refusal_seconds_bucket{instance=~"x"}[1m]))', "after a full queue"),
        ("ray_node_gram_used", GPU),
        ("ray_node_mem_used", None),
        ('rlhf_scoring_waiting_items{instance=~"x"}', None),
        ("ray_rlhf_reward_failed_tries_total", "after a reward source that failed"),
        ("ray_rlhf_updates_stood_out_total", "after an update that stood out"),
        ("ray_rlhf_learning_rate_critic", "with a critic"),
        ("ray_rlhf_loss_kl", WHEN["loss/kl"]),
        ("ray_rlhf_age_commit", "with checkpoint.every_steps other than 0"),
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
