"""Each part of a policy loss against its closed form: ratio, objective, aggregation, KL term, entropy, weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import PolicyOutputs
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, KlTerm, PolicyLoss
from rlhf_ray.trajectories.batch import TrajectoryBatch

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)
PLAIN = Clipped(0.2, 0.2)
LEVELS = ("token", "sequence", "trajectory")


def one_sequence(**columns: list[float]) -> TrajectoryBatch:
    """One sequence: a prompt token, then actions with these columns."""
    count = len(next(iter(columns.values())))
    return TrajectoryBatch.from_sequences(
        [list(range(count + 1))],
        action_mask=[[False] + [True] * count],
        **{name: [[0.0, *column]] for name, column in columns.items()},
    )


def after_prompt(*numbers: float) -> Tensor:
    return torch.tensor([0.0, *numbers], dtype=torch.float64, requires_grad=True)


def current(batch: TrajectoryBatch, seed: int) -> Tensor:
    noise = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return batch["log_probs"].double() + 0.3 * noise


def actions_of(batch: TrajectoryBatch) -> list[list[int]]:
    """Positions of the actions of every sequence."""
    starts, mask = batch.offsets.tolist(), batch["action_mask"].tolist()
    return [[t for t in range(a, b) if mask[t]] for a, b in itertools.pairwise(starts)]


# ------------------------------------------------------------------------------------------------------- the first update


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", [PLAIN, Clipped(0.2, 0.28, dual=3.0), Cispo(None, 4.0)])
def test_first_update_has_ratio_one_nothing_clipped_and_no_kl(ragged, level, objective) -> None:
    """With the same log-probs in float32, exactly; the gradient is the plain policy gradient ``-A``."""
    batch = ragged([5, 9, 3], 2, poison=math.nan).without("importance_weights")
    x = batch["log_probs"].clone().requires_grad_()
    out = PolicyLoss(objective, ratio="token" if isinstance(objective, Cispo) else level)(PolicyOutputs(x), batch)
    actions = int(batch["action_mask"].sum())
    assert (out.metrics["ratio/mean"][0].item(), out.metrics["ratio/mean"][1].item()) == (actions, actions)
    assert out.metrics["clip_fraction"][0].item() == 0
    assert out.metrics["approximate_kl"][0].item() == 0.0
    (gradient,) = torch.autograd.grad(out.loss, x)
    if level == "token":
        assert torch.equal(gradient[batch["action_mask"]], -batch["advantages"][batch["action_mask"]])


# -------------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -1.3 * 2.0, 0.0, 1),  # above the upper bound with a gain: held at 1 + clip_high
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0, 0),  # below the lower bound with a gain: pulled back up
        (0.5, -2.0, 0.8 * 2.0, 0.0, 1),  # below the lower bound with a loss: held at 1 - clip_low
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0, 0),  # above with a loss: pushed back down
        (9.0, -2.0, 4.0 * 2.0, 0.0, 0),  # so far above that the dual clip holds
        (9.0, 2.0, -1.3 * 2.0, 0.0, 1),  # the dual clip is for losses only
    ],
)
def test_the_four_sides_of_the_clip(ratio, advantage, loss, gradient, clipped) -> None:
    batch = one_sequence(log_probs=[-1.0], advantages=[advantage])
    x = after_prompt(-1.0 + math.log(ratio))
    out = PolicyLoss(Clipped(low=0.2, high=0.3, dual=4.0))(PolicyOutputs(x), batch)
    assert out.loss.item() == pytest.approx(loss)
    assert torch.autograd.grad(out.loss, x)[0][1].item() == pytest.approx(gradient)
    assert out.metrics["clip_fraction"][0].item() == clipped


@pytest.mark.parametrize(
    ("objective", "ratio", "weight", "bounded"),
    [
        (Cispo(None, 4.0), 9.0, 5.0, 1),
        (Cispo(None, 4.0), 0.1, 0.1, 0),
        (Cispo(0.2, 4.0), 0.1, 0.8, 1),
        (Cispo(None, 4.0), 1.5, 1.5, 0),
    ],
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_bounds_the_weight_and_keeps_every_gradient(objective, ratio, weight, bounded, advantage) -> None:
    new = -12.0 + math.log(ratio)
    x = after_prompt(new)
    out = PolicyLoss(objective)(PolicyOutputs(x), one_sequence(log_probs=[-12.0], advantages=[advantage]))
    assert out.loss.item() == pytest.approx(-weight * advantage * new)
    assert torch.autograd.grad(out.loss, x)[0][1].item() == pytest.approx(-weight * advantage)
    assert out.metrics["clip_fraction"][0].item() == bounded


@pytest.mark.parametrize("kind", ["tv", "binary_kl"])
@pytest.mark.parametrize(
    ("old", "new", "advantage", "gated"),
    [
        (0.5, 0.9, 2.0, True),
        (0.5, 0.9, -2.0, False),  # it comes back
        (0.5, 0.1, -2.0, True),
        (0.5, 0.1, 2.0, False),
        (1e-4, 9e-4, 2.0, False),  # nine times as likely, but no mass has moved
        (0.50, 0.55, 2.0, False),
    ],
)
def test_dppo_takes_the_gradient_where_it_would_go_further_from_too_far(kind, old, new, advantage, gated) -> None:
    high, low = {"tv": (0.2, 0.3), "binary_kl": (0.1, 0.3)}[kind]
    for cap in (None, 3.0):
        x = after_prompt(math.log(new))
        batch = one_sequence(log_probs=[math.log(old)], advantages=[advantage])
        out = PolicyLoss(Dppo(kind, low, high, cap))(PolicyOutputs(x), batch)
        weight = 0.0 if gated else min(new / old, cap or math.inf)
        assert torch.autograd.grad(out.loss, x)[0][1].item() == pytest.approx(-weight * advantage, rel=1e-4)
        assert out.metrics["clip_fraction"][0].item() == gated


def test_dppo_has_a_bound_for_each_sign_of_the_advantage() -> None:
    for advantage, new in ((1.0, 0.75), (-1.0, 0.25)):  # 0.25 apart either way
        for low, high in ((0.2, 0.3), (0.3, 0.2)):
            batch = one_sequence(log_probs=[math.log(0.5)], advantages=[advantage])
            out = PolicyLoss(Dppo("tv", low, high))(PolicyOutputs(after_prompt(math.log(new))), batch)
            assert out.metrics["clip_fraction"][0].item() == ((high if advantage > 0 else low) < 0.25)


def test_the_kl_of_dppo_is_that_of_the_policy_before_the_update() -> None:
    """KL(old || new) is 0.051 nats here, KL(new || old) 0.084."""
    batch = one_sequence(log_probs=[math.log(0.02)], advantages=[1.0])
    out = PolicyLoss(Dppo("binary_kl", 0.06, 0.06))(PolicyOutputs(after_prompt(math.log(0.1))), batch)
    assert out.metrics["clip_fraction"][0].item() == 0.0


def test_a_ratio_beyond_floating_point_stays_finite() -> None:
    batch = one_sequence(log_probs=[-400.0, -1.0], advantages=[-1.0, 1.0])
    for level in LEVELS:
        x = torch.tensor([0.0, -1.0, -400.0], requires_grad=True)
        out = PolicyLoss(PLAIN, ratio=level)(PolicyOutputs(x), batch)
        assert out.loss.isfinite()
        assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
        assert all(total.isfinite() for total, _ in out.metrics.values())


def test_a_dual_clip_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dual is 1\.0"):
        Clipped(0.2, 0.2, dual=1.0)


# ------------------------------------------------------------------------------------------------ levels and aggregation


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=SEEDS, level=st.sampled_from(LEVELS))
def test_a_ratio_is_that_of_its_unit(ragged, lengths, seed, level) -> None:
    """Without clipping the loss is ``-sum w A exp(log-ratio of the unit)``; each token of an answer has the answer's."""
    batch = ragged(lengths, seed)
    x = current(batch, seed)
    moved = (x - batch["log_probs"]).tolist()
    expected = 0.0
    for actions in actions_of(batch):
        total = sum(moved[t] for t in actions)
        for t in actions:
            exponent = {"token": moved[t], "sequence": total / len(actions), "trajectory": total}[level]
            expected -= batch["importance_weights"][t].item() * batch["advantages"][t].item() * math.exp(exponent)
    out = PolicyLoss(Clipped(1.0, 1e9), ratio=level)(PolicyOutputs(x), batch)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, seed=SEEDS)
def test_aggregation_decides_what_weighs_alike(ragged, lengths, seed) -> None:
    """``tokens``: the mean over actions; ``sequences``: the mean of answers' means; ``constant``: sums over a length."""
    batch = ragged(lengths, seed).without("importance_weights")
    x = current(batch, seed)
    terms = (-batch["advantages"] * (x - batch["log_probs"]).exp()).tolist()
    answers = [[terms[t] for t in actions] for actions in actions_of(batch) if actions]
    if not answers:
        return
    expected = {
        "tokens": sum(map(sum, answers)) / sum(map(len, answers)),
        "sequences": sum(sum(answer) / len(answer) for answer in answers) / len(answers),
        "constant": sum(map(sum, answers)) / (7 * len(answers)),
    }
    for aggregation, value in expected.items():
        loss = PolicyLoss(Clipped(1.0, 1e9), aggregation=aggregation, constant_tokens=7)
        total = loss(PolicyOutputs(x), batch)
        count = denominator(loss.denominator, batch, range(len(batch)))
        assert total.loss.item() / count == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert total.metrics["loss/policy"][1].item() == count


def test_gspo_gives_every_token_of_an_answer_the_same_gradient() -> None:
    """``s A / |y|`` at each token, with s the geometric mean of its ratios (Zheng et al. 2025, eq. 10)."""
    batch = one_sequence(log_probs=[-1.0, -2.0, -0.5], advantages=[0.7, 0.7, 0.7])
    x = after_prompt(-1.3, -1.9, -0.6)
    loss = PolicyLoss(PLAIN, ratio="sequence", aggregation="sequences")
    (gradient,) = torch.autograd.grad(loss(PolicyOutputs(x), batch).loss, x)
    assert gradient.tolist() == pytest.approx([0.0, *[-0.7 * math.exp(-0.3 / 3) / 3] * 3])


# -------------------------------------------------------------------------------------------------------- entropy and KL


def test_entropy_is_rewarded_and_not_part_of_the_reported_policy_loss() -> None:
    batch = one_sequence(log_probs=[-1.0, -2.0], advantages=[0.5, -0.25])
    entropy = after_prompt(0.7, 0.2)
    out = PolicyLoss(PLAIN, entropy_coefficient=0.1)(PolicyOutputs(after_prompt(-1.0, -2.0), entropy), batch)
    assert out.metrics["loss/policy"][0].item() == pytest.approx(-0.25)
    assert out.metrics["entropy"][0].item() == pytest.approx(0.9)
    assert out.loss.item() == pytest.approx(-0.25 - 0.1 * 0.9)
    assert torch.autograd.grad(out.loss, entropy)[0].tolist() == pytest.approx([0.0, -0.1, -0.1])


def test_without_a_bonus_the_entropy_is_reported_and_gets_no_gradient() -> None:
    """Not a gradient of zeros, for which the head would compute a backward of the entropy."""
    batch = one_sequence(log_probs=[-1.0, -2.0], advantages=[0.5, -0.25])
    log_probs, entropy = after_prompt(-1.0, -2.0), after_prompt(0.7, 0.2)
    out = PolicyLoss(PLAIN, entropy_coefficient=0.0)(PolicyOutputs(log_probs, entropy), batch)
    assert out.metrics["entropy"][0].item() == pytest.approx(0.9)
    assert torch.autograd.grad(out.loss, (log_probs, entropy), allow_unused=True)[1] is None


def test_an_entropy_bonus_needs_the_entropy(ragged) -> None:
    with pytest.raises(ValueError, match="with_entropy=True"):
        PolicyLoss(PLAIN, entropy_coefficient=0.1)(PolicyOutputs(torch.zeros(9)), ragged([5, 4], 0))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_term_adds_its_coefficient_times_the_estimate(estimator) -> None:
    r = -1.2 - (-0.7)
    value = {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[estimator]
    batch = one_sequence(log_probs=[-1.2], advantages=[0.0], reference_log_probs=[-0.7])
    out = PolicyLoss(PLAIN, kl=KlTerm(0.3, estimator))(PolicyOutputs(after_prompt(-1.2)), batch)
    assert out.loss.item() == pytest.approx(0.3 * value, rel=1e-6)
    assert out.metrics["loss/kl"][0].item() == pytest.approx(value, rel=1e-6)
    again = PolicyLoss(PLAIN, kl=KlTerm(9.0, estimator)).with_kl_coefficient(0.3)
    assert again == PolicyLoss(PLAIN, kl=KlTerm(0.3, estimator))
    assert PolicyLoss(PLAIN).with_kl_coefficient(0.3) == PolicyLoss(PLAIN)


def exact_kl(logits: Tensor, reference: Tensor) -> Tensor:
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def expected_gradient(term: KlTerm, logits: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The gradient of the term in expectation over what the old policy samples: every token of a small vocabulary."""
    logits = logits.clone().requires_grad_()
    log_p, log_old, log_q = logits.log_softmax(-1), old.log_softmax(-1), reference.log_softmax(-1)
    total = torch.zeros(())
    for token in range(len(logits)):
        batch = one_sequence(
            log_probs=[log_old[token].item()], advantages=[0.0], reference_log_probs=[log_q[token].item()]
        )
        x = torch.cat([torch.zeros(1, dtype=logits.dtype), log_p[token : token + 1]])
        total = total + log_old[token].exp() * PolicyLoss(PLAIN, kl=term)(PolicyOutputs(x), batch).loss
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("moved", [False, True])
def test_the_unbiased_gradient_is_that_of_the_kl_also_off_policy(estimator, moved) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, old, reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    old = logits + 0.3 * old if moved else logits
    wanted = torch.autograd.functional.jacobian(lambda x: exact_kl(x, reference), logits)
    gradient = expected_gradient(KlTerm(1.0, estimator), logits, old, reference)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_the_plain_gradients_are_those_of_other_things() -> None:
    """On policy: k1's is 0, k3's is that of KL(q || p), and k2's is right (Liu et al. 2025, Schulman 2020)."""
    generator = torch.Generator().manual_seed(4)
    logits, _, reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.functional.jacobian(lambda x: exact_kl(x, reference), logits)
    reverse = torch.autograd.functional.jacobian(lambda x: exact_kl(reference, x), logits)
    gradient = {
        name: expected_gradient(KlTerm(1.0, name, "plain"), logits, logits, reference) for name in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(gradient["k1"], torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient["k2"], wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient["k3"], reverse, atol=1e-6, rtol=1e-5)
    assert (wanted - reverse).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------------- wrong choices


@pytest.mark.usefixtures("outside_pytest")
@pytest.mark.parametrize(
    ("parts", "refusal"),
    [
        ({"ratio": "word"}, "ratio 'word' is unknown: use token, sequence or trajectory"),
        ({"aggregation": "mean"}, "aggregation 'mean' is unknown: use tokens, sequences or constant"),
        ({"kl": ("k4", "unbiased")}, "KL estimator 'k4' is unknown: use one of k1, k2, k3"),
        ({"kl": ("k1", "none")}, "KL gradient 'none' is unknown: use unbiased or plain"),
    ],
)
def test_an_unknown_part_is_refused(ragged, parts, refusal) -> None:
    kl = KlTerm(0.1, *parts.pop("kl")) if "kl" in parts else None
    with pytest.raises(ValueError, match=refusal):
        PolicyLoss(PLAIN, kl=kl, **parts)(PolicyOutputs(torch.zeros(9)), ragged([5, 4], 0))
