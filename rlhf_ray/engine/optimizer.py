"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with steps that can be switched off.

Invariants: while ``skip`` is set, or where the norm of the whole gradient is above ``limit``, ``step`` changes neither a weight
nor a moment nor a step count. Weight decay applies to matrices only, never to norms, biases and other vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config.sections.engine import OptimizerConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters as torch's parameter groups: matrices with weight decay, all others without.

    Empty groups are left out.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if len(full_shape(parameter)) > 1]
    vectors = [parameter for parameter in trainable if len(full_shape(parameter)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, even if ZeRO-3 keeps only a part of it on this rank."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose ``step`` does nothing while ``skip`` is set.

    DeepSpeed calls ``step`` when it likes: at ZeRO-3 once per group of parameters, and at ZeRO-0 in low precision once at
    start-up with zero gradients, which would count as an update. ``max_grad_norm`` is for gradients that are whole and
    equal on every rank: then this class clips them itself, and skips the step if their norm is not finite.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, *, max_grad_norm: float | None = None
    ) -> None:
        super().__init__(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
        )
        self.skip = True
        self.limit = math.inf
        self.refused_norm: float | None = None
        """The norm because of which the last step was not made."""
        self.whole_norm: Callable[[], float] | None = None
        """Gives the norm of the whole gradient during a step, where this class does not compute it."""
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the next step in every group."""
        for group in self.param_groups:
            group["lr"] = value

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make one update, or none. The type is torch's result: the closure's loss, else None."""
        if self.skip or (self.max_grad_norm is not None and not self._clip(self.max_grad_norm)):
            return None
        if self.max_grad_norm is None and self.limit < math.inf:
            assert self.whole_norm is not None, "the engine gives it"
            if not self._keeps_to_limit(self.whole_norm()):
                return None
        return super().step(closure)

    def _keeps_to_limit(self, norm: float) -> bool:
        # The norm is the same on every rank and in every part of a sharded step, and so is the answer.
        if norm > self.limit:
            self.refused_norm = norm
        return norm <= self.limit

    def _clip(self, max_norm: float) -> bool:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm) or not self._keeps_to_limit(self.grad_norm):
            return False
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return True
