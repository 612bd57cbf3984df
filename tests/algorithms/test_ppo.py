"""The preparation of a PPO batch: its steps in their order, its columns, its metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rlhf_ray.algorithms.ppo import PPO_METRICS, prepare_ppo

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.kl import kl_k3
from rlhf_ray.algorithms.masked import whiten
from rlhf_ray.errors import MissingColumnError
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason

DEFAULTS: dict[str, Any] = {
    "kl_coefficient": 0.1, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95,
    "whiten_advantages": False, "reward_clip": None, "missing_eos_penalty": None,
}  # fmt: skip
COMPUTED = ("token_rewards", "advantages", "returns")


def prepare(batch: TrajectoryBatch, **changes: Any) -> tuple[TrajectoryBatch, dict[str, float]]:
    return prepare_ppo(batch, **{**DEFAULTS, **changes})


def by_hand() -> TrajectoryBatch:
    """Two answers: one of two tokens that ends by itself, one of one token that was cut."""
    return TrajectoryBatch.from_sequences(
        [[1, 2, 3], [1, 2]],
        action_mask=[[False, True, True], [False, True]],
        log_probs=[[math.nan, -1.0, -2.0], [math.nan, -1.0]],
        reference_log_probs=[[math.nan, -1.5, -1.0], [math.nan, -1.0]],
        values=[[math.nan, 0.5, 1.0], [math.nan, 2.0]],
        score=[3.0, 9.0],
        finish_reason=[FinishReason.STOP, FinishReason.LENGTH],
    )


def test_two_answers_by_hand() -> None:
    batch, metrics = prepare(by_hand(), lam=0.5, reward_clip=4.0, missing_eos_penalty=1.5)
    # KL of the actions: 0.5, -1.0 | 0.0; scores after clip and penalty: 3.0 | 4.0 - 1.5
    assert batch["token_rewards"].tolist() == pytest.approx([0, -0.05, 3.1, 0, 2.5])
    # deltas: -0.05 + 1.0 - 0.5, 3.1 - 1.0 | 2.5 - 2.0
    assert batch["advantages"].tolist() == pytest.approx([0, 0.45 + 0.5 * 2.1, 2.1, 0, 0.5])
    assert batch["returns"].tolist() == pytest.approx([0, 2.0, 3.1, 0, 2.5])
    mean, returns_mean = (1.5 + 2.1 + 0.5) / 3, (2.0 + 3.1 + 2.5) / 3
    returns_variance = sum((x - returns_mean) ** 2 for x in (2.0, 3.1, 2.5)) / 3
    errors_variance = sum((x - mean) ** 2 for x in (1.5, 2.1, 0.5)) / 3
    assert metrics == pytest.approx(
        {
            "reward/mean": 6.0,
            "reward/std": 3.0,
            "reward/after_kl": (3.05 + 2.5) / 2,
            "kl/k1": (-0.5 + 0.0) / 2,
            "advantages/mean": mean,
            "advantages/std": math.sqrt(errors_variance),
            "returns/mean": returns_mean,
            "values/mean": 3.5 / 3,
            "explained_variance": 1 - errors_variance / returns_variance,
            "length/response": 1.5,
            "truncated/share": 0.5,
        },
        rel=1e-5,
    )


def test_the_clip_cannot_take_back_the_penalty() -> None:
    batch, _ = prepare(by_hand(), kl_coefficient=0.0, reward_clip=1.0, missing_eos_penalty=5.0)
    assert batch["token_rewards"].tolist() == [0, 0, 1.0, 0, -4.0]


def test_without_a_penalty_a_cut_answer_keeps_its_score() -> None:
    batch, _ = prepare(by_hand(), kl_coefficient=0.0)
    assert batch["token_rewards"].tolist() == [0, 0, 3.0, 0, 9.0]


def test_the_pieces_are_put_together_as_named(ragged) -> None:
    """Estimator, gamma, lambda, bootstrap and whitening all reach their functions."""
    batch = ragged([5, 9, 3, 1], 3, poison=math.nan)
    mask = batch["action_mask"]
    prepared, _ = prepare(batch, kl_estimator="k3", kl_coefficient=0.5, gamma=0.9, lam=0.7, whiten_advantages=True)
    kl = kl_k3(batch["log_probs"], batch["reference_log_probs"])
    rewards = torch.where(mask, -0.5 * kl, 0.0)
    for row in range(len(batch)):
        actions = mask[int(batch.offsets[row]) : int(batch.offsets[row + 1])].nonzero()[:, 0]
        if len(actions):
            rewards[batch.offsets[row] + actions[-1]] += batch["score"][row]
    advantages, returns = gae(rewards, batch["values"], mask, batch.offsets, gamma=0.9, lam=0.7,
                              bootstrap_value=batch["bootstrap_value"])  # fmt: skip
    torch.testing.assert_close(prepared["token_rewards"], rewards)
    torch.testing.assert_close(prepared["returns"], returns)
    torch.testing.assert_close(prepared["advantages"], whiten(advantages, mask))
    assert not torch.allclose(returns, gae(rewards, batch["values"], mask, batch.offsets, gamma=0.9, lam=0.7)[1])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_tokens_have_no_influence(ragged, poison) -> None:
    clean, expected_metrics = prepare(ragged([5, 1, 9], 7), whiten_advantages=True)
    dirty, metrics = prepare(ragged([5, 1, 9], 7, poison=poison), whiten_advantages=True)
    assert all(torch.equal(clean[name], dirty[name]) for name in COMPUTED)
    assert metrics == expected_metrics


def test_the_order_of_sequences_is_nothing(ragged) -> None:
    batch, order = ragged([5, 1, 9, 4], 7), [2, 0, 3, 1]
    expected, expected_metrics = prepare(batch, whiten_advantages=True)
    permuted, metrics = prepare(batch.select(order), whiten_advantages=True)
    for name in COMPUTED:
        torch.testing.assert_close(permuted[name], expected.select(order)[name])
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)


def test_whitening_covers_the_batch_and_leaves_returns_and_metrics(ragged) -> None:
    batch = ragged([5, 9, 3], 3)
    plain, plain_metrics = prepare(batch)
    whitened, metrics = prepare(batch, whiten_advantages=True)
    actions = whitened["advantages"][batch["action_mask"]]
    assert actions.mean().item() == pytest.approx(0, abs=1e-6)
    assert actions.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(whitened["returns"], plain["returns"])
    assert metrics == plain_metrics


def test_the_batch_given_stays_as_it_was_and_arrays_may_be_read_only(ragged) -> None:
    arrays = ragged([5, 9, 3], 3).without(*COMPUTED).to_arrays()
    for array in arrays.values():
        array.setflags(write=False)
    batch, twin = TrajectoryBatch.from_arrays(arrays), ragged([5, 9, 3], 3)
    prepared, metrics = prepare(batch, whiten_advantages=True, reward_clip=1.0, missing_eos_penalty=1.0)
    assert all(torch.equal(batch[column], twin[column]) for column in batch.columns)
    assert not any(name in batch for name in COMPUTED)
    assert set(prepared.columns) == {*batch.columns, *COMPUTED}
    assert tuple(metrics) == PPO_METRICS


def test_a_nan_score_reaches_the_advantages(ragged) -> None:
    batch = ragged([5, 9, 3], 3)
    score = batch["score"].clone()
    score[1] = math.nan
    prepared, _ = prepare(batch.with_columns(score=score), whiten_advantages=True, reward_clip=1.0)
    assert prepared["advantages"][batch["action_mask"]].isnan().all()


def test_a_batch_without_variation_or_without_sequences_has_finite_metrics(ragged) -> None:
    for batch in (ragged([1, 1], 0, poison=math.nan), ragged([5], 0).select([])):
        prepared, metrics = prepare(batch, whiten_advantages=True)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["explained_variance"] == 0.0
        assert (prepared["advantages"] == 0).all()


def test_everything_that_is_missing_is_named(ragged) -> None:
    with pytest.raises(MissingColumnError, match=r"'score', 'values'"):
        prepare(ragged([5], 0).without("score", "values"))
