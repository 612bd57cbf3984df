"""Operations counted by hand for a single layer, and by torch's own counter over a real forward and backward."""

from __future__ import annotations

import pytest

from rlhf_ray.planning.flops import ComputeShape, training_flops


def test_linear_and_attention_by_hand() -> None:
    shape = ComputeShape(parameters=10, trained=10, layers=1, width=4)
    assert training_flops(shape, [3]) == 6 * 10 * 3 + 3 * (2 * 2 * 9 / 2) * 4
    assert training_flops(shape, [3, 5]) == training_flops(shape, [3]) + training_flops(shape, [5])


def test_frozen_parameters_need_no_gradient_of_their_own() -> None:
    frozen = ComputeShape(parameters=10, trained=0, layers=0, width=0)
    assert training_flops(frozen, [7]) == 4 * 10 * 7


def test_it_is_what_torch_counts() -> None:
    """But for causality, which torch's counter does not see: it counts attention over whole squares."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    layer, tokens, heads = torch.nn.Linear(8, 8, bias=False), torch.randn(1, 16, 8, requires_grad=True), 2
    with FlopCounterMode(display=False) as counter:
        q, k, v = (layer(tokens).view(1, 16, heads, 4).transpose(1, 2) for _ in range(3))
        ((q @ k.transpose(2, 3)).softmax(-1) @ v).sum().backward()
    ours = training_flops(ComputeShape(3 * 64, 3 * 64, 0, 0), [16]) + 2 * training_flops(ComputeShape(0, 0, 1, 8), [16])
    assert counter.get_total_flops() == pytest.approx(ours)
