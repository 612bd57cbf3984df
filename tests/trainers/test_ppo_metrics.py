"""A KL below zero, beyond its noise, says that the samples are not the policy's own, and names the setting."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.trainers.ppo.metrics import StepMetrics, differences_by_position, negative_kl
from rlhf_ray.trajectories.batch import TrajectoryBatch

VOCABULARY, SEQUENCES, LENGTH = 20, 400, 5


class Config:
    """The two sections that are looked at."""

    class policy:
        model = ModelConfig.model_construct(dtype="fp32")

    rollout = RolloutConfig(dtype="fp32", max_new_tokens=LENGTH)


def sampled(*, top_k: int | None = None, rollout_shift: float = 0.0) -> TrajectoryBatch:
    """One token after the other from p, or from its ``top_k`` likeliest tokens; the reference q is another one."""
    torch.manual_seed(0)
    p, q = torch.randn(2, VOCABULARY).log_softmax(-1).unbind()
    drawn_from = p.exp()
    if top_k is not None:
        drawn_from = drawn_from.where(p >= p.topk(top_k).values[-1], 0.0)
        q = (p + 0.5 * (p - p.topk(top_k).values[-1])).log_softmax(-1)  # likes the likeliest tokens even more
    tokens = torch.multinomial(drawn_from, SEQUENCES * LENGTH, replacement=True).view(SEQUENCES, LENGTH)
    batch = TrajectoryBatch.from_sequences(
        [[0, *row] for row in tokens.tolist()],
        action_mask=[[False] + [True] * LENGTH] * SEQUENCES,
        weight_version=[[-1] + [0] * LENGTH] * SEQUENCES,
    )
    ids = batch["token_ids"]
    return batch.with_columns(log_probs=p[ids], reference_log_probs=q[ids], rollout_log_probs=p[ids] + rollout_shift)


def warning_about(batch: TrajectoryBatch) -> str | None:
    config: Any = Config
    return negative_kl(batch, config)


def test_samples_of_the_policy_have_no_negative_kl() -> None:
    batch = sampled()
    assert warning_about(batch) is None
    assert warning_about(batch.with_columns(reference_log_probs=batch["log_probs"])) is None, "at the start it is 0"


def test_a_cut_distribution_is_named() -> None:
    message = warning_about(sampled(top_k=3)) or ""
    assert "standard errors below 0" in message and "top_p 1, top_k 0 and min_p 0, which leave" in message


def test_another_model_in_the_rollout_is_named() -> None:
    message = warning_about(sampled(top_k=3, rollout_shift=0.2)) or ""
    assert "Rollout and trainer differ by 0.2 nats a token" in message and "rollout.dtype (fp32)" in message


def test_a_difference_that_grows_with_the_position_is_named_and_a_constant_one_is_not() -> None:
    config: Any = Config
    batch = sampled()
    place = torch.arange(1 + LENGTH).repeat(SEQUENCES)
    for slope, grows in ((1e-3, True), (0.0, False)):
        moved = batch.with_columns(rollout_log_probs=batch["log_probs"] + 1e-4 + slope * (place - 1))
        metrics, warning = differences_by_position(moved, config)
        expected = {0: 1, 1: 2, 2: 4, 3: 5, 4: 7}  # the part of 8 that each of 5 positions is in
        assert metrics.keys() == {f"rollout/log_prob_difference_part_{part}" for part in expected.values()}
        for position, part in expected.items():
            assert abs(metrics[f"rollout/log_prob_difference_part_{part}"] - 1e-4 - slope * position) < 1e-5
        assert (warning is not None) == grows
    assert "late in the answers" not in str(warning)


def test_growth_is_said_once_in_an_attempt(project_log) -> None:
    config: Any = Config
    batch, place = sampled(), torch.arange(1 + LENGTH).repeat(SEQUENCES)
    moved = batch.with_columns(rollout_log_probs=batch["log_probs"] + 1e-3 * place)
    unused: Any = None
    metrics = StepMetrics(config, unused, unused)
    metrics.by_position(moved, weight_version=1)
    assert "late in the answers" not in project_log.getvalue(), "older weights differ, which is no error"
    for _ in range(2):
        metrics.by_position(moved, weight_version=0)
    assert project_log.getvalue().count("late in the answers") == 1
