"""Estimators by definition and in expectation; the controller by Ziegler's formula."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.kl import (
    AdaptiveKl,
    FixedKl,
    kl_controller,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_loss,
    sequence_kl,
    token_kl,
)

LOG_PROBS = st.floats(-12, 0)


@settings(deadline=None, max_examples=40)
@given(log_prob=LOG_PROBS, reference=LOG_PROBS)
def test_estimators_are_their_definitions(log_prob, reference) -> None:
    p, q = torch.tensor([log_prob], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
    r = log_prob - reference
    assert kl_k1(p, q).item() == r
    assert kl_k2(p, q).item() == pytest.approx(r * r / 2)
    assert kl_k3(p, q).item() == pytest.approx(math.exp(-r) - 1 + r, rel=1e-9, abs=1e-12)
    assert kl_k3(p, q).item() >= 0


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator) -> None:
    """Over samples from the policy, by summing over all of a small vocabulary."""
    p, q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact)


def test_k2_has_the_gradient_of_the_kl() -> None:
    logits, q = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits, q = logits.requires_grad_(), q.log_softmax(-1)
    p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad((p.exp().detach() * kl_k2(p, q)).sum(), logits)
    torch.testing.assert_close(of_k2, exact)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_equal_log_probs_have_no_kl_exactly(ragged, estimator) -> None:
    batch = ragged([5, 9], 0, poison=math.nan)
    kl = token_kl(batch["log_probs"], batch["log_probs"], batch["action_mask"], estimator)
    assert (kl == 0).all()


def test_k3_keeps_small_differences_in_float32() -> None:
    """``exp(-r) - 1 + r`` as it stands is a multiple of 6e-8 there, more than ten times the truth."""
    p, q = torch.tensor([-2.0]), torch.tensor([-2.0001])
    r = (p.double() - q.double()).item()
    assert kl_k3(p, q).item() == pytest.approx(r * r / 2, rel=0.01)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_sequence_sums_its_actions(ragged, estimator) -> None:
    batch = ragged([5, 1, 9], 4, poison=math.nan)
    function = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator]
    kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], batch["action_mask"], batch.offsets, estimator)
    for row in range(3):
        one = batch.select([row])
        mask = one["action_mask"]
        expected = function(one["log_probs"][mask], one["reference_log_probs"][mask]).sum().item()
        assert kl[row].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("outside_pytest")
def test_an_unknown_estimator_and_a_wrong_shape_are_refused() -> None:
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="'exact' is unknown: use one of k1, k2, k3"):
        token_kl(torch.zeros(2), torch.zeros(2), mask, "exact")
    with pytest.raises(ValueError, match=r"reference log_probs has shape \(1,\)"):
        token_kl(torch.zeros(2), torch.zeros(1), mask)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 64 / 10_000),
        (5.4, 1 - 0.1 * 64 / 10_000),
        (60.0, 1 + 0.2 * 64 / 10_000),  # the error is clipped
        (-3.0, 1 - 0.2 * 64 / 10_000),
    ],
)
def test_adaptive_control_is_zieglers_formula(kl, factor) -> None:
    controller = AdaptiveKl(coefficient=0.1, target=6.0, horizon=10_000)
    assert controller.update(kl, 64).coefficient == pytest.approx(0.1 * factor, rel=1e-12)
    assert controller.coefficient == 0.1


def test_the_coefficient_stays_positive_and_finite() -> None:
    controller = AdaptiveKl(coefficient=0.1, target=6.0, horizon=10)
    assert controller.update(0.0, 1000).coefficient == pytest.approx(0.08)
    for bad in (math.nan, math.inf):
        assert controller.update(bad, 1000) == controller


def test_the_state_survives_a_checkpoint() -> None:
    controller = AdaptiveKl(0.1, 6.0, 100).update(9.0, 50)
    state = json.loads(json.dumps(controller.state()))
    assert AdaptiveKl(0.1, 6.0, 100).restored(state) == controller


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKl(0.05)
    assert controller.update(100.0, 64).coefficient == 0.05
    assert FixedKl(0.05).restored(json.loads(json.dumps(controller.state()))) == controller


def test_a_target_makes_control_adaptive() -> None:
    assert kl_controller(0.05, None, 10_000) == FixedKl(0.05)
    assert kl_controller(0.05, 6.0, 10_000) == AdaptiveKl(0.05, 6.0, 10_000)


@pytest.mark.parametrize(("field", "wrong"), [("coefficient", 0.0), ("target", math.nan), ("horizon", -1)])
def test_settings_that_cannot_control_are_refused(field, wrong) -> None:
    with pytest.raises(ValueError, match=f"positive {field}"):
        AdaptiveKl(**{"coefficient": 0.1, "target": 6.0, "horizon": 100, field: wrong})


def test_a_kl_in_the_loss_leaves_later_tokens_out_and_one_in_the_reward_counts_them() -> None:
    """All answers of two tokens to one prompt: the loss has the gradient of each token's KL with the state before it fixed,
    and the sum of the penalties of a token and those after it, as a negative reward, that of the KL of whole answers."""
    size, generator = 3, torch.Generator().manual_seed(2)
    first = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    second = torch.randn(size, size, generator=generator, dtype=torch.float64)
    at = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    log_probs = torch.stack([first.log_softmax(-1)[at[:, 0]], second.log_softmax(-1)[at[:, 0], at[:, 1]]], 1)
    reference = torch.full_like(log_probs, -math.log(size))
    share = log_probs.sum(1).exp().detach()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, first, retain_graph=True)[0]

    actions = torch.ones(log_probs.numel(), dtype=torch.bool)
    flat, ratio = log_probs.flatten(), torch.zeros(log_probs.numel(), dtype=torch.float64)
    loss = kl_loss(flat, ratio, reference.flatten(), actions, estimator="k3", gradient="unbiased")
    of_first = (first.softmax(-1) * (first.log_softmax(-1) + math.log(size))).sum()
    torch.testing.assert_close(gradient((share * loss.view(-1, 2).sum(1)).sum()), gradient(of_first))

    penalties = token_kl(flat, reference.flatten(), actions, "k1").view(-1, 2).detach()
    to_go = penalties.flip(1).cumsum(1).flip(1)
    whole = (log_probs.sum(1).exp() * (log_probs - reference).sum(1)).sum()
    torch.testing.assert_close(gradient((share * (to_go * log_probs).sum(1)).sum()), gradient(whole))
    assert (gradient(whole) - gradient(of_first)).abs().max() > 0.05
