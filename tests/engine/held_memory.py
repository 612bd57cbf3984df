"""Scenarios that count the bytes an engine holds: unique storages of live tensors, never a formula."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from toy import engine_config

from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.engine import Engine

LAYERS, WIDTH, ADAPTER = 16, 256, 32
"""Powers of two, so that a pinned block is as large as what is in it; the gradient of one layer weighs little beside all."""
CASES = [
    *(("bf16", zero, "none") for zero in range(4)),
    *(("bf16", zero, "optimizer") for zero in (1, 2, 3)),
    *(("bf16", 3, "all"), ("fp32", 2, "optimizer")),
    *((kind, zero, "none") for kind in ("fp32", "lora") for zero in (0, 3)),
]  # fmt: skip
ALONE = CASES[:4]
"""Those that a lone rank counts too."""
Storages = dict[int, int]


class Adapted(nn.Module):
    """A frozen square layer with a trained one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(WIDTH, ADAPTER, bias=False)
        self.up = nn.Linear(ADAPTER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.frozen(hidden) + self.up(self.down(hidden))


def storages(tensors: Iterable[Tensor]) -> Storages:
    """Bytes of each storage of ``tensors``, once each."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def live() -> Storages:
    """Bytes of each storage that any tensor of this process holds, with those of gradients."""
    tensors: list[Tensor] = []
    for thing in gc.get_objects():
        try:
            if isinstance(thing, Tensor):
                tensors += [thing] if thing.grad is None else [thing, thing.grad]
        except ReferenceError:
            continue
    return storages(tensors)


class Count:
    """Counts by part what has come since it was made."""

    def __init__(self) -> None:
        gc.collect()
        self.before = live()
        self.moments: dict[str, dict[str, float]] = {}

    def at(self, moment: str, engine: Engine) -> None:
        """Note, in bytes, the weights, the moments of the optimizer, and each other storage that is not tiny."""
        assert engine.optimizer is not None
        own = {pointer: size for pointer, size in live().items() if pointer not in self.before}
        parameters = list(engine.module.parameters())
        shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        weights = storages([*(p.data for p in parameters), *shards])
        kept = storages(t for state in engine.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        rest = sorted((size for pointer, size in own.items() if pointer not in weights | kept), reverse=True)
        self.moments[moment] = {
            "weights": sum(weights.values()), "moments": sum(kept.values()), "rest": [s for s in rest if s > 4096],
        }  # fmt: skip


def held(kind: str, zero: int, offload: str) -> dict[str, Any]:
    """Storages at three moments of the second update: with all gradients, after AdamW's step, and after the update.

    ``kind`` is a dtype, or ``lora`` for bf16 with adapters. Under ZeRO-3 the start of the backward pass is counted too.
    """
    count, dtype = Count(), "fp32" if kind == "fp32" else "bf16"
    layers = [Adapted() if kind == "lora" else nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    module = nn.Sequential(*layers)
    engine = Engine(module, engine_config(zero, offload=offload), dtype=dtype, total_updates=8, trainable=True)
    assert engine.optimizer is not None
    batch = [torch.ones(4, WIDTH, dtype=next(module.parameters()).dtype) for _ in range(2)]
    counting = False  # the first update also makes the moments

    def after_step(*arguments: Any) -> None:
        if counting and not engine.optimizer.skip:
            count.at("step", engine)

    def step(model: nn.Module, inputs: Tensor) -> LossOutput:
        outputs = model(inputs)
        if counting and zero == 3:
            outputs.register_hook(lambda gradient: count.at("forward", engine))
        return LossOutput(outputs.float().square().sum(), {})

    last = next(p for p in module.parameters() if p.requires_grad)  # its gradient comes last
    hook = last.register_hook(lambda gradient: count.at("backward", engine) if counting else None)
    engine.optimizer.register_step_post_hook(after_step)
    engine.accumulate(batch, step, 8.0)
    engine.apply(skip=False)
    counting = True
    engine.accumulate(batch, step, 8.0)
    engine.apply(skip=False)
    count.at("rest", engine)
    hook.remove()
    engine.close()
    return count.moments


def scenarios(world: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every case by name."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    for case in CASES if world > 1 else ALONE:
        yield "held-{}-zero{}-{}".format(*case), lambda own=case: held(*own)
