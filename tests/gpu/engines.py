"""Whether the engine trains on one rank of the device as plain torch does, and how fast.

Always true: the reference is a loop with torch's own AdamW on fp32 weights, which knows nothing of DeepSpeed; in bf16 it
runs the model in bf16 and keeps the weights in fp32, as mixed precision does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sequences import ragged_sequences
from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.engine import Engine, deepspeed_config, destroy_process_group, init_process_group
from rlhf_ray.engine.optimizer import parameter_groups
from rlhf_ray.environment import Device
from rlhf_ray.models import Actor, PackedPolicy, PackedRegression
from rlhf_ray.models.dtypes import DTYPES
from rlhf_ray.models.from_config import load_policy
from rlhf_ray.planning.flops import training_flops
from rlhf_ray.trajectories import Packed, TrajectoryBatch, pack
from tests.gpu.loaders import write_policy
from tests.gpu.shapes import compute_shape, config_of, make
from tests.gpu.sizes import Sizes
from tests.gpu.throughput import Bench, Findings, reward_model

UPDATES = 3
OPTIMIZER = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0}
LIMITS = {"fp32": 1e-2, "bf16": 0.05}
"""How far weights may be off those of the reference, as a share of how far these moved."""
BYTES_A_WEIGHT = 20
"""Of training in bf16 at ZeRO 2: the weight, its gradient in bf16 and fp32, and the optimizer's three fp32 numbers."""
SHARE_FOR_WEIGHTS = 0.7
"""Of the GPU's memory: the rest is for activations, and for what the optimizer holds in a step."""


def engine_trains_as_plain_adamw(device: Device, sizes: Sizes, *, zero: int) -> str:
    """Some updates in both precisions; at ZeRO-3 the model is read in shards."""
    torch.backends.cuda.matmul.allow_tf32 = False
    init_process_group(0, 1, None, device=torch.device(device))
    off = {}
    with TemporaryDirectory() as folder:
        path = write_policy(Path(folder), sizes)
        for dtype in LIMITS:
            config = ModelConfig.model_validate({"path": path, "dtype": dtype})
            packs = _packs(sizes, device)
            before, after = _reference(config, packs, torch.device(device))
            found = _trained(config, packs, torch.device(device), zero)
            if found.keys() != after.keys():
                raise AssertionError(f"the engine holds other weights: {found.keys() ^ after.keys()}")
            moved = sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5
            off[dtype] = sum(float((found[name] - after[name]).square().sum()) for name in after) ** 0.5 / moved
    destroy_process_group()
    wrong = {dtype: number for dtype, number in off.items() if not number <= LIMITS[dtype]}
    if wrong:
        raise AssertionError(f"after {UPDATES} updates at ZeRO {zero} weights are off by {wrong} (limits {LIMITS})")
    return f"{UPDATES} updates, weights off by " + ", ".join(f"{o:.1e} of their way in {d}" for d, o in off.items())


def training_of_small_model(device: Device, sizes: Sizes) -> Findings:
    """Updates of a policy at ZeRO 2, all activations kept."""
    actor = Actor(make(sizes.small, device), attn_implementation="auto")
    shape, method = compute_shape(actor.model), f"policy, attention {actor.attention}"
    return _speed(PackedPolicy(actor), "policy_update", method, sizes.small, device, sizes, sizes.batch, shape)


def training_of_large_model(device: Device, sizes: Sizes) -> Findings:
    """Updates of all weights of a reward model at ZeRO 2 with gradient checkpointing: of as many layers as fit."""
    layers = sizes.large_layers or _layers_that_fit(sizes.large)
    model = reward_model(sizes.large, device, layers)
    model.gradient_checkpointing_enable()
    shape, method = compute_shape(model.backbone), f"reward model of {layers} layers, attention {model.attention}"
    return _speed(
        PackedRegression(model),
        "reward_update",
        f"{method}, gradient checkpointing",
        sizes.large,
        device,
        sizes,
        sizes.large_batch,
        shape,
    )


def _speed(
    module: nn.Module, work: str, method: str, name: str, device: Device, sizes: Sizes, count: int, shape: Any
) -> Findings:
    init_process_group(0, 1, None, device=torch.device(device))
    bench = Bench(name, device, sizes, count)
    engine = Engine(module, engine_config(2), dtype="bf16", total_updates=None, trainable=True)

    def update(packs: list[Packed]) -> None:
        engine.accumulate(packs, loss, float(sum(bench.lengths)))
        engine.apply(skip=False)

    found = bench.measure_batch(
        work, f"{method}, whole updates of an engine at ZeRO 2", update, training_flops(shape, bench.lengths)
    )
    engine.close()
    destroy_process_group()
    return found


def loss(module: nn.Module, packed: Packed) -> LossOutput:
    """Of a policy the summed negative log-probability of a pack, of a reward model one that every score has a part in."""
    if isinstance(module, PackedPolicy):
        return LossOutput(-module(packed).log_probs.sum(), {})
    return LossOutput(-nn.functional.logsigmoid(module(packed, "scores").float()).sum(), {})


def engine_config(zero: int) -> EngineConfig:
    """AdamW with weight decay and clipping."""
    return EngineConfig.model_validate({"zero": zero, "optimizer": OPTIMIZER})


def _packs(sizes: Sizes, device: Device) -> list[Packed]:
    sequences = ragged_sequences(sizes.sequences, 64, longest=sizes.longest)
    half = len(sequences) // 2
    return [pack(TrajectoryBatch.from_sequences(part)).to(device) for part in (sequences[:half], sequences[half:])]


def _denominator(packs: list[Packed]) -> float:
    return float(sum(part.num_tokens for part in packs))


def _trained(config: ModelConfig, packs: list[Packed], device: torch.device, zero: int) -> dict[str, Tensor]:
    settings = engine_config(zero)
    shards = deepspeed_config(settings, dtype=config.dtype, trainable=True, world_size=1) if zero == 3 else None
    actor = load_policy(config, device=device, ds_config=shards)
    engine = Engine(PackedPolicy(actor), settings, dtype=config.dtype, total_updates=None, trainable=True)
    if engine.device.type != device.type:
        raise AssertionError(f"the engine computes on {engine.device}, not on {device}")
    for _ in range(UPDATES):
        report = engine.accumulate(packs, loss, _denominator(packs))
        if engine.apply(skip=not report.finite).skipped:
            raise AssertionError("an update with finite gradients was skipped")
    weights = {name: tensor.float().cpu() for name, tensor in engine.disk_weights(actor.model)}
    engine.close()
    return weights


def _reference(
    config: ModelConfig, packs: list[Packed], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after, from fp32 weights that torch's own AdamW moves."""
    module = PackedPolicy(load_policy(config, device=device))
    exact = copy.deepcopy(module).float()
    before = _weights(module)
    groups = parameter_groups(exact, OPTIMIZER["weight_decay"])
    settings = EngineConfig.model_validate({"optimizer": OPTIMIZER}).optimizer
    assert settings is not None
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        for part in packs:  # summed in fp32
            module.zero_grad()
            (loss(module, part).loss / _denominator(packs)).backward()
            for low, high in zip(module.parameters(), exact.parameters(), strict=True):
                high.grad = low.grad.float() if high.grad is None else high.grad + low.grad
        nn.utils.clip_grad_norm_(exact.parameters(), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        with torch.no_grad():
            for low, high in zip(module.parameters(), exact.parameters(), strict=True):
                low.copy_(high.to(DTYPES[config.dtype]))
    return before, _weights(module)


def _weights(module: PackedPolicy) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu().clone() for name, p in module.actor.model.named_parameters()}


def _layers_that_fit(name: str) -> int:
    """Layers of which all weights can be trained in this GPU's memory."""
    config = config_of(name)
    one, two = (_backbone_size(name, layers) for layers in (1, 2))
    free = SHARE_FOR_WEIGHTS * torch.cuda.mem_get_info()[0] - BYTES_A_WEIGHT * (2 * one - two)
    return max(1, min(int(config.num_hidden_layers), int(free // (BYTES_A_WEIGHT * (two - one)))))


def _backbone_size(name: str, layers: int) -> int:
    """Weights of a model without its output layer."""
    backbone = make(name, "meta", layers).base_model
    return sum(parameter.numel() for parameter in backbone.parameters())
