"""Saved by some ranks, gone on with by others: a model that breaks where anything of its state is lost, and what to compare.

The model has two parameter groups, of which only one decays, sizes that neither two nor three divide, a buffer that its output
depends on and that changes with each update, and frozen weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from curves import UPDATES_AFTER, UPDATES_BEFORE
from inspect_engine import steps
from torch import Tensor, nn

from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.config.sections.models import Dtype
from rlhf_ray.engine import Engine, universal

TOTAL = 24
ROWS, TOKENS, WIDTH, CLASSES = 7, 17, 13, 11
Measured = dict[str, Any]


class Odd(nn.Module):
    """Classifies tokens. With ``alone`` the group without decay is one number, of which most ranks hold nothing."""

    def __init__(self, *, tied: bool = False, alone: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.inner = nn.Linear(WIDTH, CLASSES, bias=not alone)
        self.norm = nn.LayerNorm(CLASSES, elementwise_affine=not alone)
        self.outer = nn.Linear(CLASSES, WIDTH if tied else CLASSES, bias=False)
        self.head = nn.Linear(WIDTH if tied else CLASSES, TOKENS if tied else CLASSES, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.bias = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.full((CLASSES,), 1.25), requires_grad=False)
        self.register_buffer("temperature", torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(self.embedding(tokens))) * self.scale
        logits = self.head(torch.tanh(self.outer(self.norm(hidden)))) * (1 + self.bias)
        return logits.float() / self.temperature.mean()


def make_odd(shift: float = 0.0, *, seed: int = 5, **options: bool) -> Odd:
    """The same model every time; with ``shift`` one of other trained weights and another buffer, but the same frozen ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Odd(**options)
    with torch.no_grad():
        for weight in model.parameters():
            weight += shift if weight.requires_grad else 0.0
        model.temperature += shift
    return model


def odd_engine(zero: int, dtype: Dtype, shift: float = 0.0, *, offload: str = "none", **options: bool) -> Engine:
    """An engine with clipping and a moving rate. Its decay is large, so that losing it shows at once."""
    optimizer = {
        "learning_rate": 0.02, "weight_decay": 0.5, "max_grad_norm": 1.0, "schedule": "linear", "warmup_fraction": 0.25,
    }  # fmt: skip
    config = EngineConfig.model_validate({"zero": zero, "offload": offload, "optimizer": optimizer})
    return Engine(make_odd(shift, **options), config, dtype=dtype, total_updates=TOTAL, trainable=True)


def update(engine: Engine, seed: int) -> float:
    """One update with a batch that is the same on any number of ranks; returns its loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (ROWS, 4), generator=generator)
    own = [row for index, row in enumerate(tokens) if index % engine.world_size == engine.rank]

    def loss_of(module: nn.Module, rows: list[Tensor]) -> LossOutput:
        logits = module(torch.stack(rows))
        targets = torch.stack(rows) % CLASSES
        return LossOutput(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), {})

    report = engine.accumulate([own], loss_of, float(tokens.numel()))
    engine.apply(skip=not report.finite)
    engine.module.temperature += 0.07
    loss = torch.tensor(report.loss, dtype=torch.float64)
    dist.all_reduce(loss)
    return float(loss)


def saved(directory: Path, engine: Engine, before: int = UPDATES_BEFORE) -> Measured:
    """Train, save into ``directory``, go on: the curve after the save."""
    for seed in range(before):
        update(engine, seed)
    engine.save_shards(directory)
    curve = [update(engine, seed) for seed in range(before, before + UPDATES_AFTER)]
    measured = {"curve": curve, "steps": steps(engine), "updates": engine.updates}
    engine.close()
    return measured


def gone_on(directory: Path, engine: Engine, before: int = UPDATES_BEFORE, then: Path | None = None) -> Measured:
    """Load ``directory`` and go on: the same curve. ``then`` is where the state is saved after half of it."""
    engine.load_shards(directory)
    noise = torch.rand(2).tolist()
    frozen = engine.module.scale
    curve = []
    for seed in range(before, before + UPDATES_AFTER):
        if then is not None and seed == before + UPDATES_AFTER // 2:
            engine.save_shards(then)
        curve.append(update(engine, seed))
    measured = {
        "curve": curve, "steps": steps(engine), "updates": engine.updates, "noise": noise,
        "decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "temperature": [round(float(x), 4) for x in engine.module.temperature], "frozen": frozen.numel(),
    }  # fmt: skip
    engine.close()
    return measured


def loaded_by_deepspeed_alone(directory: Path, engine: Engine) -> Measured:
    """What DeepSpeed's own loading makes of two groups at ZeRO-3 and of a buffer, without what is put right after it."""
    pending = universal._converted(directory / "shards", directory.parent, without_moments=False)
    with universal._reading_universal(engine._deepspeed):
        engine._deepspeed.load_checkpoint(str(pending.path), tag=universal.CONVERTED, load_lr_scheduler_states=False)
    pending.abort()
    optimizer = engine.optimizer
    assert optimizer is not None
    measured = {
        "step_counts": len({id(state["step"]) for state in optimizer.state.values()}),
        "decays": [group["weight_decay"] for group in optimizer.param_groups],
        "temperature": [round(float(x), 4) for x in engine.module.temperature],
    }  # fmt: skip
    engine.close()
    return measured
