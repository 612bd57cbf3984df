"""What happens to gradients before DeepSpeed sees them."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.engine import distributed
from rlhf_ray.engine.engine import Engine
from rlhf_ray.engine.gradients import FullPrecisionSums, GradientWatch
from tests.engine.inspect_engine import bits, same_bits

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


class Operators(TorchDispatchMode):
    """Counts what torch computes, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[Any]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


UPDATES = {
    "plain": (0.01, 2, False, 1e9),
    "clipped": (100.0, 2, False, 1e9),
    "infinite": (1e38, 2, False, 1e9),
    "finite, but not its square": (1e20, 2, False, 1e9),
    "skipped": (1.0, 2, True, 1e9),
    "refused by its norm": (9.0, 2, False, 0.5),
    "without one parameter": (0.1, 1, False, 1e9),
}
"""By name: the scale of the gradient, how many layers the loss depends on, and the arguments of ``apply``."""


def updates_of(engine: Engine) -> tuple[list[Any], list[torch.Tensor], Operators]:
    """What was applied of these updates with which norm, the state after each, and the operators of the first step."""
    rows = torch.linspace(-1, 1, 48, dtype=torch.bfloat16).view(6, 8)
    said: list[Any] = []
    held: list[torch.Tensor] = []
    counted: list[Operators] = []
    for scale, used, skip, limit in UPDATES.values():

        def loss(module: nn.Module, micro: torch.Tensor, scale: float = scale, used: int = used) -> LossOutput:
            return LossOutput((module[:used](micro).float() * scale).square().sum() / scale, {})  # type: ignore[index]

        engine.accumulate([rows[:3], rows[3:]], loss, 6.0)
        with Operators() as operators:
            applied = engine.apply(skip, limit)
        counted.append(operators)
        optimizer = engine._deepspeed.optimizer
        gradients = [one.grad for group in (*optimizer.fp16_groups, *optimizer.fp32_groups) for one in group]
        assert gradients == [None] * 8, "none is held until the next update, or added to it"
        said.append((applied.skipped, applied.grad_norm, applied.refused_norm, optimizer.loss_scale_config.cur_iter))
        held += bits(engine)
    return said, held, counted[0]


def test_a_step_in_fewer_passes_gives_the_bits_of_deepspeeds_own() -> None:
    """Also where DeepSpeed changes: the step, and what of it a step in fewer passes calls, are its own."""
    if not torch.distributed.is_initialized():
        distributed.init_process_group(0, 1, None)
    results = []
    for stock in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).bfloat16()
        config = EngineConfig.model_validate({"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1}})
        engine = Engine(module, config, dtype="bf16", total_updates=10, trainable=True)
        if stock:
            del engine._deepspeed.optimizer.step  # that of the instance
        results.append(updates_of(engine))
        engine.close()
    (said, held, their_operators), (mine, mine_held, operators) = results
    assert [skipped for skipped, *_ in said] == [False, False, True, True, True, True, False]
    assert said == mine and same_bits(held, mine_held)
    aten = torch.ops.aten
    assert their_operators.counts[aten.amax.default] == 4, "DeepSpeed looks for NaN as it did"
    assert operators.counts[aten.amax.default] == operators.counts[aten.mul_.Tensor] == 0
    assert operators.counts[aten._to_copy.default] == 2 * 4, "to bf16 from the sum over micro-batches, and to fp32"
    assert their_operators.counts[aten._to_copy.default] == 3 * 4
