"""What the tests read out of an engine: its state bit for bit, and the gradient that its optimizer saw."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_fp32_param
from torch import Tensor, nn

from rlhf_ray.engine.engine import Engine
from rlhf_ray.engine.optimizer import parameter_groups


def bits(engine: Engine) -> list[Tensor]:
    """This rank's weights, masters and moments."""
    assert engine.optimizer is not None
    parameters = list(engine.module.parameters())
    if engine.config.zero == 3:
        held = [p.ds_tensor for p in parameters] + [safe_get_local_fp32_param(p) for p in parameters]
    else:
        held = parameters + [master for group in engine.optimizer.param_groups for master in group["params"]]
    held += [value for state in engine.optimizer.state.values() for _, value in sorted(state.items())]
    return [tensor.detach().clone() for tensor in held]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return len(left) == len(right) and all(_bytes(a).equal(_bytes(b)) for a, b in zip(left, right, strict=True))


def digest(engine: Engine) -> str:
    """Of the weights of this rank, where it holds all of them."""
    held = b"" if engine.config.zero == 3 else b"".join(_bytes(p.detach()).numpy() for p in engine.module.parameters())
    return hashlib.sha256(held).hexdigest()


def steps(engine: Engine) -> list[float]:
    """How many steps the optimizer has counted, without repeats."""
    assert engine.optimizer is not None
    return sorted({float(state["step"]) for state in engine.optimizer.state.values()})


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def weights(engine: Engine) -> dict[str, Tensor]:
    """Whole weights by live name, on rank 0."""
    return {name: tensor for group in engine.full_state() for name, tensor in group}


def first_gradient(engine: Engine) -> dict[str, Tensor]:
    """The gradient that the optimizer saw in its first step: AdamW's first moment is then ``(1 - beta1) * gradient``."""
    assert engine.config.optimizer is not None
    if engine.config.zero == 3:
        moments = {p: safe_get_full_optimizer_state(p, "exp_avg") for p in engine.module.parameters()}
    else:
        moments = _joined_moments(engine)
    scale = 1.0 - engine.config.optimizer.betas[0]
    return {name: moments[p].double() / scale for name, p in engine.module.named_parameters()}


def _joined_moments(engine: Engine) -> dict[nn.Parameter, Tensor]:
    """First moments of ZeRO 0 to 2, whose masters lie flat, one part a rank, in the order of their group."""
    assert engine.optimizer is not None
    moments: dict[nn.Parameter, Tensor] = {}
    live_groups = parameter_groups(engine.module, 0.0)
    for live, group in zip(live_groups, engine.optimizer.param_groups, strict=True):
        part = torch.cat([engine.optimizer.state[master]["exp_avg"].flatten() for master in group["params"]])
        parts = [part]
        if engine.config.zero > 0:
            parts = [torch.empty_like(part) for _ in range(engine.world_size)]
            dist.all_gather(parts, part)
        flat, start = torch.cat(parts), 0
        for parameter in live["params"]:
            moments[parameter] = flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
    return moments
