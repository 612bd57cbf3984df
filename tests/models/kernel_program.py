"""Runs the Triton kernels of the log-prob head in Triton's interpreter, and prints as JSON how far they are from exact.

The interpreter is chosen where triton is imported, so this is a process of its own: ``TRITON_INTERPRET=1 kernel_program.py``.
"""

from __future__ import annotations

import json
from itertools import product

import torch
from torch import Tensor, nn

from rlhf_ray.models.forward import log_prob_kernels as kernels
from rlhf_ray.models.forward import log_probs
from rlhf_ray.models.forward.log_probs import LogProbHead

VOCABULARY, TOKENS = 50, 5
CPU = torch.device("cpu")


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def head(bias: bool, softcap: float | None, temperature: float, of_entropy: bool) -> float:
    """A whole head on the kernels against the formula in fp64: numbers and gradients."""
    torch.manual_seed(0)
    layer = nn.Linear(16, VOCABULARY, bias=bias)
    hidden, targets = torch.randn(TOKENS, 16).mul(3).requires_grad_(), torch.randint(VOCABULARY, (TOKENS,))
    ours = LogProbHead.around(layer, softcap)(hidden, targets, temperature, True)
    logits = hidden.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = (capped / temperature).log_softmax(-1)
    exact = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    weights, inputs, gradients = torch.linspace(-1, 1, TOKENS), (hidden, *layer.parameters()), []
    for chosen, entropy in (ours, exact):
        loss = (chosen * weights).sum() + ((entropy * weights.flip(0)).sum() if of_entropy else 0)
        gradients.append(torch.autograd.grad(loss, inputs))
    pairs = [*zip(ours, exact, strict=True), *zip(*gradients, strict=True)]
    return max(off(a.detach(), b.detach()) for a, b in pairs)


def moving(slope: float) -> float:
    """Sums of rows whose highest logit is in another block than the one before."""
    noise = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    logits, targets = noise + torch.linspace(0, slope * 20, 100), torch.tensor([0, 50, 99])
    log_p = logits.double().log_softmax(-1)
    exact = log_p.gather(1, targets[:, None])[:, 0], logits.double().logsumexp(-1), -(log_p.exp() * log_p).sum(-1)
    ours = kernels.from_logits(logits, targets, 1.0, None, True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(ours, exact, strict=True))


def gradients_in_memory() -> dict[str, object]:
    logits, targets = torch.randn(4, VOCABULARY), torch.arange(4)
    rest = (targets, logits.logsumexp(-1), torch.ones(4), None, 1.0, None)
    half = kernels.logits_gradient(logits, *rest, torch.bfloat16)
    half_off = off(half, log_probs.logits_gradient(logits.clone(), *rest, torch.float32))
    in_place = kernels.logits_gradient(logits, *rest, torch.float32).data_ptr() == logits.data_ptr()
    return {"half": str(half.dtype), "half_off": half_off, "in_place": in_place}


def main() -> None:
    works = log_probs.kernels_work(kernels, CPU)
    kernels.BLOCK = 32  # so that a vocabulary has several blocks and a rest
    log_probs._functions = lambda device: kernels
    cases = product((False, True), (None, 2.0), (1.0, 0.6), (False, True))
    measured = {"works": works, "heads": {str(case): head(*case) for case in cases}, "gradients": gradients_in_memory()}
    print(json.dumps(measured | {"moving": [moving(slope) for slope in (-9.0, 0.0, 9.0)]}))


if __name__ == "__main__":
    main()
