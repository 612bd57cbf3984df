"""What happens to gradients before DeepSpeed sees them."""

from __future__ import annotations

from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.engine.gradients import FullPrecisionSums, GradientWatch

CPU = torch.device("cpu")


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype))


def test_many_small_bf16_gradients_are_not_lost() -> None:
    plain, summed = parameter(torch.bfloat16), parameter(torch.bfloat16)
    sums = FullPrecisionSums([summed])
    for _ in range(600):
        plain.sum().backward()
        summed.sum().backward()
    assert summed.grad is None
    sums.hand_over()
    assert plain.grad.tolist() == [256.0] * 3  # 256 + 1 rounds to 256 in bf16
    assert summed.grad.tolist() == [600.0] * 3 and summed.grad.dtype == torch.bfloat16


def test_sums_start_again_after_they_were_handed_over() -> None:
    summed = parameter(torch.bfloat16)
    sums = FullPrecisionSums([summed])
    (summed.sum() * float("nan")).backward()
    sums.hand_over()
    summed.grad = None
    summed.sum().backward()
    sums.hand_over()
    assert summed.grad.tolist() == [1.0] * 3
    sums.remove()
    summed.sum().backward()
    assert summed.grad.tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_in_any_gradient_is_noticed_once(poison: float, dtype: torch.dtype) -> None:
    good, bad = parameter(dtype), parameter(dtype)
    watch = GradientWatch([good, bad], CPU)
    (good.sum() + bad.sum()).backward()
    assert watch.end_update()[0]
    (good.sum() + (bad * torch.tensor([1.0, poison, 1.0])).sum()).backward()
    good.sum().backward()
    assert not watch.end_update()[0]
    assert watch.end_update()[0]  # the next update is judged by itself
    bad.grad = None
    watch.remove()
    (bad * poison).sum().backward()
    assert watch.end_update()[0]


def test_large_and_opposite_gradients_are_finite() -> None:
    large = parameter()
    watch = GradientWatch([large], CPU)
    (large * torch.tensor([1e38, -1e38, 1e38])).sum().backward()
    assert watch.end_update()[0]


def test_parameters_that_a_pass_leaves_out_are_counted() -> None:
    always, sometimes, tied = parameter(), parameter(), parameter()
    watch = GradientWatch([always, sometimes, tied], CPU)
    for parts in ((always, sometimes, tied, tied), (always, tied)):
        sum(part.sum() for part in parts).backward()
        watch.end_pass()
    assert watch.end_update() == (True, 1)
    (always.sum() + sometimes.sum() + tied.sum()).backward()
    watch.end_pass()
    assert watch.end_update() == (True, 0)


class SumsAlive(TorchDispatchMode):
    """Notes at every conversion how many of ``sums`` are still in memory."""

    def __init__(self, sums: list[torch.Tensor]) -> None:
        super().__init__()
        self.sums, self.alive = [ref(one) for one in sums], []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.alive.append(sum(one() is not None for one in self.sums))
        return function(*args, **(kwargs or {}))


def test_a_sum_is_gone_before_the_next_gradient_is_made() -> None:
    parameters = [parameter(torch.bfloat16) for _ in range(3)]
    sums = FullPrecisionSums(parameters)
    for _ in range(2):
        sum(one.sum() for one in parameters).backward()
    mode = SumsAlive(list(sums._sums.values()))
    with mode:
        sums.hand_over()
    assert mode.alive == [3, 2, 1]
    assert [one.grad.tolist() for one in parameters] == [[2.0] * 3] * 3
