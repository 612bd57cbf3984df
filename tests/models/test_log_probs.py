"""Chunked log-probs and entropies are those of the whole logits, forward and backward, in fp32 and in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.models.forward import log_probs
from rlhf_ray.models.forward.log_probs import LogProbHead, chunk_size

HIDDEN, VOCABULARY, TOKENS = 16, 50, 23


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = hidden.float() @ weight.float().t() + (0 if bias is None else bias.float())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 6 * VOCABULARY)
    monkeypatch.setattr(log_probs, "FEWEST_TOKENS_AT_ONCE", 1)
    assert chunk_size(VOCABULARY) == 6


def case(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[LogProbHead, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(TOKENS, HIDDEN).mul(3).to(dtype).requires_grad_()
    return LogProbHead.around(layer, None), hidden, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_equals_naive_forward_and_backward(
    bias: bool, softcap: float | None, temperature: float, with_entropy: bool
) -> None:
    head, hidden, targets = case(bias=bias)
    head.softcap = softcap
    mine, mine_entropy = head(hidden, targets, temperature, with_entropy)
    theirs, theirs_entropy = naive(hidden, head.weight, head.bias, targets, temperature, softcap)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    weights, entropy_weights = torch.randn(2, TOKENS)
    loss, expected = (mine * weights).sum(), (theirs * weights).sum()
    if with_entropy:
        torch.testing.assert_close(mine_entropy, theirs_entropy, atol=1e-6, rtol=1e-6)
        loss, expected = (
            loss + (mine_entropy * entropy_weights).sum(),
            expected + (theirs_entropy * entropy_weights).sum(),
        )
    else:
        assert mine_entropy is None
    inputs = (hidden, *head.parameters())
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_numbers_are_fp32_under_a_bf16_model_and_under_autocast() -> None:
    head, hidden, targets = case(torch.bfloat16)
    exact, exact_entropy = naive(hidden, head.weight, None, targets, 1.0, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, entropy = head(hidden, targets, 1.0, True)
    assert mine.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(mine, exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, exact_entropy, atol=1e-6, rtol=1e-6)
    mine.sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    expected = torch.autograd.grad(naive(hidden, head.weight, None, targets, 1.0, None)[0].sum(), (hidden, head.weight))
    for a, b in zip((hidden.grad, head.weight.grad), expected, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2


def test_inputs_are_not_changed_and_nothing_frozen_gets_a_gradient() -> None:
    head, hidden, targets = case()
    head.weight.requires_grad_(False)
    before, weight = hidden.detach().clone(), head.weight.clone()
    head(hidden, targets, 0.5, True)[0].sum().backward()
    assert torch.equal(hidden, before) and torch.equal(head.weight, weight)
    assert head.weight.grad is None and hidden.grad is not None


def test_no_tokens_give_no_numbers_and_a_zero_gradient() -> None:
    """A rank that has nothing to predict still calls the head, so that no collective waits for it."""
    head, hidden, targets = case()
    mine, _ = head(hidden[:0], targets[:0])
    mine.sum().backward()
    assert mine.shape == (0,) and not head.weight.grad.any() and not hidden.grad.any()


def test_never_more_logits_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product with the vocabulary is counted, forward and backward."""
    rows: list[int] = []
    original = log_probs._logits
    monkeypatch.setattr(log_probs, "_logits", lambda h, *rest: (rows.append(len(h)), original(h, *rest))[1])
    head, hidden, targets = case()
    head(hidden, targets, 1.0, True)[0].sum().backward()
    assert rows == [6, 6, 6, 5] * 2


def test_without_targets_it_is_the_output_layer() -> None:
    head, hidden, _ = case(bias=True)
    assert torch.equal(head(hidden), nn.functional.linear(hidden, head.weight, head.bias))


def test_parameters_stay_the_same_objects() -> None:
    layer = nn.Linear(HIDDEN, VOCABULARY)
    head = LogProbHead.around(layer, None)
    assert head.weight is layer.weight and head.bias is layer.bias
