"""Log-probs in blocks of tokens are those of the whole logits, forward and backward, in bounded memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.models.forward import log_prob_blocks, log_probs
from rlhf_ray.models.forward.log_probs import LogProbHead
from tests.models.counted import LiveBytes
from tests.models.test_log_probs import gradients_agree, naive

HIDDEN, VOCABULARY, TOKENS = 16, 50, 23
KEPT, AGAIN = 1 << 20, 0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight tokens, of which three at once, and seven columns: none divides its side."""
    monkeypatch.setattr(log_prob_blocks, "BLOCK_BYTES", 10 * VOCABULARY * 4)
    monkeypatch.setattr(log_prob_blocks, "FEWEST_ROWS", 1)
    monkeypatch.setattr(log_prob_blocks, "NUMBERS_AT_ONCE", 3 * VOCABULARY)
    monkeypatch.setattr(log_prob_blocks, "COLUMNS_AT_ONCE", 7)


def case(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[LogProbHead, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=False).to(dtype)
    hidden = torch.randn(TOKENS, HIDDEN).mul(scale).to(dtype).requires_grad_()
    return LogProbHead.around(layer, None), hidden, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("most", [KEPT, AGAIN])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("with_entropy", "in_loss"), [(False, False), (True, False), (True, True)])
def test_they_equal_the_whole_forward_and_backward_whether_probabilities_are_kept_or_not(
    monkeypatch: pytest.MonkeyPatch, most: int, temperature: float, with_entropy: bool, in_loss: bool
) -> None:
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", most)
    head, hidden, targets = case()
    mine, entropy = head(hidden, targets, temperature, with_entropy, entropy_in_loss=in_loss)
    theirs, theirs_entropy = naive(hidden, head.weight, None, targets, temperature, None)
    gradients_agree(head, hidden, mine, entropy, theirs, theirs_entropy)


def test_a_plain_head_on_a_cpu_takes_them_and_no_other_head_does(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = log_prob_blocks.log_probs_in_blocks
    monkeypatch.setattr(
        log_probs, "log_probs_in_blocks", lambda h, *rest: (taken.append(len(h)), original(h, *rest))[1]
    )
    head, hidden, targets = case()
    head(hidden, targets)
    assert taken == [TOKENS]
    head.softcap = 2.0
    head(hidden, targets)
    LogProbHead.around(nn.Linear(HIDDEN, VOCABULARY), None)(hidden, targets)
    assert taken == [TOKENS]


@pytest.mark.parametrize("most", [KEPT, AGAIN])
def test_the_gradient_of_a_token_that_is_almost_certain_does_not_drown_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Its logit has the gradient ``1 - p``, here about 1e-4, where a probability in bf16 would be 1."""
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", most)
    head = LogProbHead.around(nn.Linear(1, VOCABULARY, bias=False), None)
    weight = torch.zeros(VOCABULARY, 1)
    weight[3] = 13.0
    head.weight = nn.Parameter(weight.bfloat16())
    hidden, targets = torch.ones(TOKENS, 1, dtype=torch.bfloat16), torch.full((TOKENS,), 3)
    mine, _ = head(hidden, targets)
    exact, _ = naive(hidden, head.weight, None, targets, 1.0, None)
    for_weight, expected = (torch.autograd.grad(numbers.sum(), head.weight)[0][3] for numbers in (mine, exact))
    assert float(for_weight) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize(("most", "products"), [(KEPT, 3), (AGAIN, 6)])
def test_logits_are_computed_once_where_probabilities_are_kept_and_never_more_than_a_block(
    monkeypatch: pytest.MonkeyPatch, most: int, products: int
) -> None:
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", most)
    shapes, blocks = list[torch.Size](), list[weakref.ref[Tensor]]()
    original = log_prob_blocks._logits

    def counted(*arguments: Any) -> Tensor:
        assert most == KEPT or all(block() is None for block in blocks), "the one before lives"
        logits = original(*arguments)
        shapes.append(logits.shape)
        blocks.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(log_prob_blocks, "_logits", counted)
    head, hidden, targets = case()
    head(hidden, targets, 1.0, True)[0].sum().backward()
    assert len(shapes) == products and max(shapes) == (8, VOCABULARY)


def test_probabilities_are_kept_for_a_backward_alone_and_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tokens = nn.Linear(8, 2000, bias=False), 200
    monkeypatch.setattr(log_prob_blocks, "BLOCK_BYTES", 5 * 2000 * 4)
    monkeypatch.setattr(log_prob_blocks, "COLUMNS_AT_ONCE", 100)
    hidden, targets = torch.randn(tokens, 8).requires_grad_(), torch.randint(2000, (tokens,))
    head, kept = LogProbHead.around(layer, None), tokens * 2000 * 4
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", kept)

    def peak(**options: Any) -> Any:
        with LiveBytes((hidden, head.weight, targets)) as forward:
            head(hidden, targets, **options)
        return forward.peak

    assert kept <= peak() <= kept * 1.2
    assert kept <= peak(with_entropy=True) <= kept * 1.2
    assert peak(with_entropy=True, entropy_in_loss=True) < kept * 0.2, (
        "the entropy's gradient would compute logits anyhow"
    )
    with torch.no_grad():
        assert peak() < kept * 0.2
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", kept - 1)
    assert peak() < kept * 0.2


def test_probabilities_are_gone_after_the_backward_pass_while_the_loss_lives() -> None:
    """Or those of two micro-batches would be there at once."""
    layer, hidden, targets = nn.Linear(8, 2000, bias=False), torch.randn(200, 8), torch.randint(2000, (200,))
    head, kept = LogProbHead.around(layer, None), 200 * 2000 * 4
    with LiveBytes((hidden, head.weight, targets)) as both:
        loss = head(hidden.requires_grad_(), targets)[0].sum()
        assert both.live >= kept
        loss.backward()
        assert both.live < kept * 0.2
    assert loss.isfinite()


def test_a_pass_without_gradients_gives_the_bits_of_one_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the first ratio would not be exactly 1."""
    head, hidden, targets = case(torch.bfloat16)
    with torch.no_grad():
        before, _ = head(hidden, targets, 0.7)
    for most in (KEPT, AGAIN):
        monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", most)
        assert torch.equal(head(hidden, targets, 0.7, True)[0], before)


@pytest.mark.parametrize("blocks", [1, 2, 3, 10, 600])
def test_the_gradient_of_a_weight_in_half_precision_is_rounded_at_most_once_a_block(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """Also of the target that every token has; and in more than two blocks once in all, or the sum would stand still."""
    tokens, chance = 600, 0.75
    layer = nn.Linear(2, VOCABULARY, bias=False)
    logit = torch.tensor(chance / (1 - chance) * (VOCABULARY - 1)).log()
    layer.weight = nn.Parameter(torch.zeros(VOCABULARY, 2).index_fill(0, torch.tensor(3), float(logit)).bfloat16())
    hidden = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).repeat(tokens, 1)
    monkeypatch.setattr(log_prob_blocks, "BLOCK_BYTES", -(-tokens // blocks) * VOCABULARY * 4)
    given = torch.ones(tokens)
    given[::7] = -0.5
    mine, _ = LogProbHead.around(layer, None)(hidden, torch.full((tokens,), 3))
    exact, _ = naive(hidden, layer.weight, None, torch.full((tokens,), 3), 1.0, None)
    found, expected = (
        torch.autograd.grad(numbers, layer.weight, given.to(numbers.dtype))[0].double() for numbers in (mine, exact)
    )
    half = torch.finfo(torch.bfloat16).eps / 2
    # One rounding of each probability and of each factor, which is the same one for all tokens, and one of each sum.
    assert torch.allclose(found[:, 0], expected[:, 0], rtol=(3 + min(blocks, 3)) * half, atol=0.0)
    assert not found[:, 1].any()


@pytest.mark.parametrize("most", [KEPT, AGAIN])
@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_in_half_precision_every_gradient_is_near_the_exact_one_where_tokens_come_again(
    monkeypatch: pytest.MonkeyPatch, most: int, fp32: bool, blocks: int
) -> None:
    monkeypatch.setattr(log_prob_blocks, "KEPT_BYTES", most)
    monkeypatch.setattr(log_prob_blocks, "BLOCK_BYTES", -(-TOKENS // blocks) * VOCABULARY * (4 if fp32 else 2))
    head, hidden, _ = case(torch.bfloat16, scale=1.0)
    head.fp32 = fp32
    targets = torch.tensor([7, 7, 49, 0, 7, 12] * 4)[:TOKENS]
    given = torch.randn(TOKENS)
    for temperature in (1.0, 0.6):
        mine, _ = head(hidden, targets, temperature)
        exact, _ = naive(hidden, head.weight, None, targets, temperature, None)
        found = torch.autograd.grad(mine, (hidden, head.weight), given)
        expected = torch.autograd.grad(exact, (hidden, head.weight), given.double())
        for own, theirs in zip(found, expected, strict=True):
            assert own.dtype == torch.bfloat16
            error = (own.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
            assert float(error.max()) < (0.01 if fp32 else 0.02)
