"""Chunked log-probs and entropies are those of the whole logits, forward and backward, in fp32, in bounded memory, and without
a pass over the logits that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.models.forward import log_probs
from rlhf_ray.models.forward.log_probs import LogProbHead, chunk_size
from rlhf_ray.trajectories.kept_sets import KeptSets
from tests.models.counted import LiveBytes, Passes
from tests.models.gpu_kernels import half_precision_products

HIDDEN, VOCABULARY, TOKENS = 16, 50, 23


def naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute on all logits, or token by token on those that were kept, in fp64."""
    logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if kept is not None:
        rows = [(row[inside] / temperature).log_softmax(-1) for row, inside in zip(logits, kept, strict=True)]
        places = [int(inside[:target].sum()) for inside, target in zip(kept, targets.tolist(), strict=True)]
        chosen = [row[place] for row, place in zip(rows, places, strict=True)]
        return torch.stack(chosen), torch.stack([-(row.exp() * row).sum() for row in rows])
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 6 * VOCABULARY)
    monkeypatch.setattr(log_probs, "FEWEST_TOKENS_AT_ONCE", 1)
    assert chunk_size(VOCABULARY) == 6


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the head compute in chunks of whole rows on a CPU too, as it does on a GPU and over kept sets."""
    monkeypatch.setattr(log_probs, "blocks_suit", lambda *_: False)


def case(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[LogProbHead, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(TOKENS, HIDDEN).mul(3).to(dtype).requires_grad_()
    return LogProbHead.around(layer, None), hidden, torch.randint(VOCABULARY, (TOKENS,))


def gradients_agree(
    head: LogProbHead,
    hidden: Tensor,
    mine: Tensor,
    mine_entropy: Tensor | None,
    theirs: Tensor,
    theirs_entropy: Tensor,
) -> tuple[Tensor, ...]:
    """Compare log-probs, entropies if there are some, and the gradients of a weighted sum; returns those of the head."""
    torch.testing.assert_close(mine.double(), theirs, atol=1e-6, rtol=1e-6)
    weights, entropy_weights = torch.randn(2, TOKENS)
    loss, expected = (mine * weights).sum(), (theirs * weights).sum()
    if mine_entropy is not None:
        torch.testing.assert_close(mine_entropy.double(), theirs_entropy, atol=1e-6, rtol=1e-6)
        loss = loss + (mine_entropy * entropy_weights).sum()
        expected = expected + (theirs_entropy * entropy_weights).sum()
    inputs = (hidden, *head.parameters())
    gradients = torch.autograd.grad(loss, inputs)
    for a, b in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    return gradients


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_equals_naive_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
    blocks: bool,
    bias: bool,
    softcap: float | None,
    temperature: float,
    with_entropy: bool,
) -> None:
    if not blocks:
        monkeypatch.setattr(log_probs, "blocks_suit", lambda *_: False)
    head, hidden, targets = case(bias=bias)
    head.softcap = softcap
    mine, mine_entropy = head(hidden, targets, temperature, with_entropy)
    theirs, theirs_entropy = naive(hidden, head.weight, head.bias, targets, temperature, softcap)
    assert (mine_entropy is not None) == with_entropy
    gradients_agree(head, hidden, mine, mine_entropy, theirs, theirs_entropy)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_over_kept_sets_it_equals_a_softmax_of_what_was_kept(
    bias: bool, softcap: float | None, with_entropy: bool
) -> None:
    """Sets of one token, few, half and all; the weight of a token that nobody kept gets no gradient."""
    head, hidden, targets = case(bias=bias)
    head.softcap = softcap
    kept = torch.rand(TOKENS, VOCABULARY) < torch.tensor([0.0, 0.1, 0.6, 1.0]).repeat(TOKENS)[:TOKENS, None]
    kept[torch.arange(TOKENS), targets] = True
    unused = next(token for token in range(VOCABULARY) if token not in targets.tolist())
    kept[:, unused] = False
    mine, mine_entropy = head(hidden, targets, 0.6, with_entropy, KeptSets.from_mask(kept))
    assert (mine_entropy is not None) == with_entropy
    theirs, theirs_entropy = naive(hidden, head.weight, head.bias, targets, 0.6, softcap, kept)
    assert not mine[kept.sum(1) == 1].any(), "among one token there is no choice"
    gradients = gradients_agree(head, hidden, mine, mine_entropy, theirs, theirs_entropy)
    assert not gradients[1][unused].any()


def test_log_probs_and_entropies_are_as_exact_as_fp32() -> None:
    """An entropy is put together from sums over the vocabulary, not from log-probs that were rounded one by one."""
    torch.manual_seed(0)
    layer, hidden, targets = nn.Linear(64, 4000, bias=False), torch.randn(300, 64), torch.randint(4000, (300,))
    mine = LogProbHead.around(layer, None)(hidden, targets, 1.0, True)
    for ours, exact in zip(mine, naive(hidden, layer.weight, None, targets, 1.0, None), strict=True):
        assert (ours - exact).norm() / exact.norm() < torch.finfo(torch.float32).eps


def test_numbers_are_fp32_under_a_bf16_model_and_under_autocast() -> None:
    head, hidden, targets = case(torch.bfloat16)
    exact, exact_entropy = naive(hidden, head.weight, None, targets, 1.0, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, entropy = head(hidden, targets, 1.0, True)
    assert mine.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(mine.double(), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=1e-6, rtol=1e-6)
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


@pytest.mark.usefixtures("in_chunks")
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


def one_chunk(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[LogProbHead, Tensor, Tensor]:
    monkeypatch.setattr(log_probs, "FEWEST_TOKENS_AT_ONCE", TOKENS)
    return case(dtype)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_forward_passes_over_the_logits_as_often_as_it_must(
    monkeypatch: pytest.MonkeyPatch, with_entropy: bool
) -> None:
    """An entropy costs a product with what is there, and its sum; the powers then lie beside the logits."""
    head, hidden, targets = one_chunk(monkeypatch)
    with Passes(TOKENS * VOCABULARY) as passes:
        head(hidden, targets, 1.0, with_entropy)
    sums = {"exp": 1, "mul_": 1, "sum": 2} if with_entropy else {"exp_": 1, "sum": 1}
    assert passes.counts == {"mm": 1, "amax": 1, "sub_": 1, "gather": 1} | sums


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("of_entropy", [False, True])
def test_a_backward_passes_over_the_logits_as_often_as_it_must(
    monkeypatch: pytest.MonkeyPatch, of_entropy: bool
) -> None:
    """Where no loss depends on the entropies that a forward gave, the backward is the one without them."""
    head, hidden, targets = one_chunk(monkeypatch)
    mine, entropy = head(hidden, targets, 1.0, True)
    loss = mine.sum() + entropy.sum() if of_entropy else mine.sum()
    with Passes(TOKENS * VOCABULARY) as passes:
        loss.backward()
    inner = {"exp": 1, "addcmul": 1, "mul_": 1} if of_entropy else {"exp_": 1, "mul_": 1}
    products = {"mm": 2, "addmm_": 1}  # the logits again, and the gradients of hidden states and of the weight
    assert passes.counts == products | {"sub_": 1, "scatter_add_": 1} | inner


@pytest.mark.usefixtures("in_chunks")
def test_a_temperature_costs_one_pass_each_way_and_a_temperature_of_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = one_chunk(monkeypatch)
    for temperature, divisions in ((1.0, 0), (0.7, 2)):
        with Passes(TOKENS * VOCABULARY) as passes:
            head(hidden, targets, temperature, True)[0].sum().backward()
        assert passes.counts["div_"] == divisions and passes.counts["div"] == 0


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize(("with_entropy", "chunks_at_once"), [(False, 1), (True, 2)])
def test_memory_is_that_of_one_chunk_and_the_gradients(
    monkeypatch: pytest.MonkeyPatch, with_entropy: bool, chunks_at_once: int
) -> None:
    """An entropy needs the logits of its chunk twice; in the backward only where a loss depends on it."""
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 64 * 2000)
    layer, hidden, targets = nn.Linear(8, 2000, bias=False), torch.randn(200, 8), torch.randint(2000, (200,))
    head, chunk, rest = LogProbHead.around(layer, None), 64 * 2000 * 4, 10_000
    hidden.requires_grad_()
    inputs = (hidden, head.weight, targets)
    with LiveBytes(inputs) as forward:
        mine, entropy = head(hidden, targets, 1.0, with_entropy)
    assert chunks_at_once * chunk <= forward.peak <= chunks_at_once * chunk + rest
    gradients = head.weight.nbytes + hidden.nbytes
    with LiveBytes((*inputs, mine)) as backward:
        mine.sum().backward(retain_graph=True)
    assert chunk + gradients <= backward.peak <= chunk + gradients + rest
    if entropy is not None:
        with LiveBytes((*inputs, mine)) as backward:
            torch.autograd.grad(mine.sum() + entropy.sum(), inputs[:2])
        assert 2 * chunk + gradients <= backward.peak <= 2 * chunk + gradients + rest


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the head take the products that it takes on a GPU."""
    monkeypatch.setattr(log_probs, "blocks_suit", lambda *_: False)
    monkeypatch.setattr(log_probs, "_sums_wider", lambda left, right: left.dtype == right.dtype != torch.float32)
    with half_precision_products():
        yield


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_products_in_half_precision_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is never copied to fp32, and its gradient, a sum over all chunks, is rounded once."""
    head, hidden, targets = case(torch.bfloat16)
    weights = torch.randn(TOKENS)
    with Passes(head.weight.numel()) as passes:
        mine, _ = head(hidden, targets)
        (mine * weights).sum().backward()
    exact, _ = naive(hidden, head.weight, None, targets, 1.0, None)
    torch.testing.assert_close(mine.double(), exact, atol=1e-6, rtol=1e-6)
    assert passes.counts == {"mm": 12, "zeros_like": 1, "addmm": 4, "_to_copy": 1}
    (expected,) = torch.autograd.grad((exact * weights).sum(), head.weight)
    off = (head.weight.grad.double() - expected).norm() / expected.norm()
    assert off < 3e-3
