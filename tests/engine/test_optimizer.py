"""AdamW with steps that can be switched off, without DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_ray.config.sections.engine import OptimizerConfig
from rlhf_ray.engine.optimizer import SkippableAdamW, parameter_groups

CONFIG = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def backward(model: nn.Module, scale: float = 1.0) -> None:
    model.zero_grad()
    (scale * model(torch.arange(5)).square().sum()).backward()


def test_weight_decay_touches_matrices_only() -> None:
    model = module()
    matrices, vectors = parameter_groups(model, 0.5)
    assert [p.dim() for p in matrices["params"]] == [2, 2] and matrices["weight_decay"] == 0.5
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0


def test_frozen_and_tied_parameters_are_left_out_and_taken_once() -> None:
    model = module()
    model[2].bias.requires_grad_(False)
    model.add_module("again", model[0])
    groups = parameter_groups(model, 0.5)
    assert sum(len(group["params"]) for group in groups) == 4
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    assert len(parameter_groups(model, 0.5)) == 1


def test_it_skips_until_told_otherwise() -> None:
    model = module()
    optimizer = SkippableAdamW(parameter_groups(model, 0.5), CONFIG)
    before = [p.clone() for p in model.parameters()]
    backward(model)
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True)) and not optimizer.state
    optimizer.skip = False
    optimizer.step()
    assert not any(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bound", [1e3, 0.01])
def test_it_clips_as_torch_does_and_tells_the_norm_before(bound: float) -> None:
    model, plain = module(), module()
    optimizer = SkippableAdamW(parameter_groups(model, 0.5), CONFIG, max_grad_norm=bound)
    expected = torch.optim.AdamW(parameter_groups(plain, 0.5), lr=0.1, betas=CONFIG.betas, eps=CONFIG.eps)
    optimizer.skip = False
    for scale in (1.0, 5.0):
        backward(model, scale)
        backward(plain, scale)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), bound)
        optimizer.step()
        expected.step()
        assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_it_refuses_a_norm_that_is_not_finite(poison: float) -> None:
    model = module()
    optimizer = SkippableAdamW(parameter_groups(model, 0.5), CONFIG, max_grad_norm=1.0)
    optimizer.skip = False
    before = [p.clone() for p in model.parameters()]
    backward(model)
    model[1].bias.grad[2] = poison
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True)) and not optimizer.state
