"""Check gradients for NaN and Inf, and add them in fp32, before DeepSpeed gets them; pass over them less often in its step.

Invariants: a NaN or Inf in any gradient of this rank is noticed, at every ZeRO stage and before any rank applies anything.
Gradients of several micro-batches are added in fp32, whatever the model computes in. A step with fewer passes gives the bits
of DeepSpeed's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_set_local_grad
from torch import Tensor, nn


def clear_shards(parameters: Iterable[nn.Parameter]) -> None:
    """Zero the gradient shards of ZeRO-3 parameters.

    DeepSpeed 0.19 overwrites a shard in the first backward pass of an update and adds to it in later ones. A parameter that
    the first pass does not use (a rarely chosen expert, one of two heads) would keep the gradient of an earlier update.
    """
    sharded: Iterable[Any] = parameters
    for parameter in sharded:
        shard = parameter.ds_tensor
        safe_set_local_grad(parameter, torch.zeros(1, device=shard.device).expand(shard.numel()))


def norm_in_step(deepspeed_engine: Any) -> float:
    """The norm of the whole gradient over all ranks, unscaled and before clipping, while DeepSpeed makes a step.

    DeepSpeed 0.19.8 has it by the time it calls the optimizer that it wraps, but ``get_global_grad_norm`` returns it only after
    the step, too late to refuse it. So it is read where DeepSpeed keeps it, which is not public.
    """
    return float(deepspeed_engine.optimizer._global_grad_norm)


def step_in_fewer_passes(deepspeed_engine: Any) -> None:
    """Let DeepSpeed's optimizer of ZeRO 0 in bf16 read gradients as often as its step needs; leave any other as it is.

    DeepSpeed 0.19.8 first looks for the largest and smallest number of every gradient, to find NaN and Inf, which the norm
    shows too; converts all of them to fp32 once for the norm and once for the step; and multiplies them by 1 where nothing
    is clipped. There is no setting for it, so ``step`` is replaced on the instance.
    """
    optimizer = deepspeed_engine.optimizer
    if type(optimizer) is FP16_UnfusedOptimizer and optimizer.low_precision_dtype == torch.bfloat16:
        optimizer.step = partial(_step, optimizer)


def _step(optimizer: Any, closure: None = None) -> bool:
    """What ``FP16_UnfusedOptimizer.step`` does; returns whether the norm was not finite."""
    squares = []
    for halves, wholes in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        square = torch.zeros((), device=halves[0].device)
        for half, whole in zip(halves, wholes, strict=True):
            whole.grad = torch.zeros_like(whole) if half.grad is None else half.grad.float()
            square += whole.grad.norm() ** 2
        squares.append(square)
    norms = [float(square) ** 0.5 for square in squares]
    optimizer._global_grad_norm = math.sqrt(sum(norm**2.0 for norm in norms))
    optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
    if optimizer.overflow:
        return bool(optimizer._skip_invalid_grad_norm())
    optimizer._update_scale(False)
    if optimizer.unscale_and_clip_grads(optimizer._global_grad_norm, apply_scale=False) != 1.0:
        optimizer.unscale_and_clip_grads(optimizer._global_grad_norm)
    optimizer.optimizer.step()
    for halves, wholes in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for half, whole in zip(halves, wholes, strict=True):
            whole.grad = None
            half.data.copy_(whole.data)
    return False


class GradientWatch:
    """Watches the gradients of ``parameters`` for NaN and Inf, and for parameters that a backward pass does not reach.

    It waits for the device only at the end of an update.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._trace = torch.zeros((), device=device)
        self._hooks = [parameter.register_hook(partial(self._check, i)) for i, parameter in enumerate(parameters)]
        self._reached: set[int] = set()
        self._missed: set[int] = set()

    def _check(self, index: int, gradient: Tensor) -> None:
        # Zero times a sum is NaN exactly where the sum holds NaN or Inf. It is made in fp32 in any case, and a result in bf16,
        # which has the range of fp32, takes no conversion of every number.
        result = gradient.dtype if gradient.dtype == torch.bfloat16 else torch.float32
        self._trace += gradient.detach().sum(dtype=result).float() * 0.0
        self._reached.add(index)

    def end_pass(self) -> None:
        """Note which parameters the backward pass that has just ended did not reach."""
        self._missed |= set(range(len(self._hooks))) - self._reached
        self._reached.clear()

    def end_update(self) -> tuple[bool, int]:
        """Return whether all gradients of this update were finite, and how many parameters some pass did not reach."""
        finite, missed = bool(torch.isfinite(self._trace)), len(self._missed)
        self._trace.zero_()
        self._missed.clear()
        return finite, missed

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


class FullPrecisionSums:
    """Adds low-precision gradients in fp32, where DeepSpeed would add micro-batches in the model's precision."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._move) for parameter in parameters]

    def _move(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        before = self._sums.get(parameter)
        # The gradient of the first micro-batch needs no sum: it stays as it is until a second one comes.
        self._sums[parameter] = parameter.grad if before is None else before.float().add_(parameter.grad)
        parameter.grad = None

    def hand_over(self) -> None:
        """Give every parameter its summed gradient, rounded once, and start a new sum."""
        for parameter in list(self._sums):
            # Each sum goes before the next gradient comes, so that never all of both are held.
            parameter.grad = self._sums.pop(parameter).to(parameter.dtype)

    def remove(self) -> None:
        """Stop adding."""
        for hook in self._hooks:
            hook.remove()
