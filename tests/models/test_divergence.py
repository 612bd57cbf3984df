"""Divergences from a teacher are those of torch and of plain sums, in value and gradient, however the tokens are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.algorithms.losses import Distillation, Divergence, PolicyOutputs
from rlhf_ray.models import PackedPolicy
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.forward import divergence as module
from rlhf_ray.models.forward.divergence import Teacher
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack

LOSSES = [Divergence("forward_kl"), Divergence("reverse_kl"), Divergence("jsd", 0.3), Divergence("jsd", 0.9, 1.7)]
BEGINNING = [(7 * place) % 20 for place in range(40)]
SEQUENCES = [[*BEGINNING, 8, 9], [*BEGINNING, 3], [11, 4, 2, 9, 9, 9, 1]]


def model(seed: int, hidden: int = 16, vocabulary: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def slow(log_p: torch.Tensor, log_q: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """By torch's own KL, or by its definition."""

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)

    if divergence.name == "forward_kl":
        return kl(log_q, log_p)
    if divergence.name == "reverse_kl":
        return kl(log_p, log_q)
    beta = divergence.beta
    mean = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, mean) + (1 - beta) * kl(log_p, mean)


@pytest.mark.parametrize("divergence", LOSSES, ids=str)
def test_a_divergence_has_its_definition_is_never_negative_and_is_nothing_between_equals(
    divergence: Divergence,
) -> None:
    torch.manual_seed(0)
    log_p, log_q = (
        (3 * torch.randn(50, 30, dtype=torch.float64)).log_softmax(-1),
        torch.randn(50, 30).double().log_softmax(-1),
    )
    found = divergence(log_p, log_q)
    torch.testing.assert_close(found, slow(log_p, log_q, divergence))
    assert (found > 0).all()
    assert divergence(log_p, log_p).abs().max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("divergence", LOSSES, ids=str)
def test_a_pack_has_the_divergences_and_gradients_of_single_sequences(
    divergence: Divergence, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is wider, has rows of padding behind the vocabulary, and shares the beginning that two sequences have."""
    monkeypatch.setattr(module, "chunk_size", lambda *_, **__: chunk)
    student, wide = model(1), model(2, hidden=32, vocabulary=27)
    mask = [[False, *(place % 3 > 0 for place in range(1, len(ids)))] for ids in SEQUENCES]
    batch = TrajectoryBatch.from_sequences(SEQUENCES, action_mask=mask)
    teacher = Teacher(Actor(wide, param_dtype="fp32", attn_implementation="sdpa"))
    policy = PackedPolicy(Actor(student, param_dtype="fp32", attn_implementation="sdpa"))
    packed = pack(batch, tuple(range(len(SEQUENCES))))
    assert packed.parent is not None, "two sequences share their beginning"
    outputs = policy(packed, wanted=batch["action_mask"], teacher=teacher, divergence=divergence)
    loss = Distillation(divergence, 0.25)(outputs, batch)
    loss.loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    assert all(parameter.grad is None for parameter in wide.parameters())
    student.zero_grad()

    total = torch.zeros(())
    for ids, chosen in zip(SEQUENCES, mask, strict=True):
        tokens = torch.tensor([ids])
        logits = student(tokens).logits[0, :-1]
        log_p = (logits / divergence.temperature).log_softmax(-1)
        with torch.no_grad():
            log_q = (wide(tokens).logits[0, :-1, :24] / divergence.temperature).log_softmax(-1)
        each = 0.75 * slow(log_p, log_q, divergence)
        each = each - 0.25 * logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        total = total + each[torch.tensor(chosen[1:])].sum()
    total.backward()
    assert float(loss.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_at_most_a_chunk_of_logits_is_kept_for_the_backward_pass() -> None:
    """What autograd saves grows with the hidden states, not with the vocabulary."""
    student, wide = model(1, vocabulary=4096), model(2, vocabulary=4096)
    teacher = Teacher(Actor(wide, param_dtype="fp32", attn_implementation="sdpa"))
    head = Actor(student, param_dtype="fp32", attn_implementation="sdpa").log_prob_head
    hidden, own = torch.randn(600, 16, requires_grad=True), torch.randn(600, 16)
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> Any:
        saved.append(tensor.numel() if tensor.shape != head.weight.shape else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        teacher.divergences(head, hidden, own, Divergence("reverse_kl"))
    assert max(saved) <= 600 * 16


def test_a_loss_without_a_teacher_says_so() -> None:
    batch = TrajectoryBatch.from_sequences([[1, 2]], action_mask=[[False, True]])
    with pytest.raises(ValueError, match="was given no teacher"):
        Distillation(Divergence("reverse_kl"))(PolicyOutputs(torch.zeros(2)), batch)
