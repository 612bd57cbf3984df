"""What a trainer of TRL needs to run some updates a turn and to wait in between; for scripts in TRL's own environment.

Invariants: a turn is measured from its first update to its last. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback

ROWS = 8


def answer(**content: Any) -> None:
    """Write one line of JSON for the process that gave the order."""
    print(json.dumps(content), flush=True)


class Turns(TrainerCallback):
    """Waits for an order before each turn, and measures from its first update to its last."""

    left, started_at = 0, 0.0
    losses: list[float]

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        if self.left == 0:
            self.left = json.loads(sys.stdin.readline())["updates"]
            self.losses.clear()
            self.started_at = time.perf_counter()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.left -= 1
        if self.left == 0:
            answer(seconds=time.perf_counter() - self.started_at, losses=self.losses)


class OneInSome:
    """Beside a trainer: runs one in ``every`` batches that the strategy makes, a short epoch with the same mix of lengths."""

    every = turn = 1
    losses: list[float]

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)  # type: ignore[misc]
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *arguments: Any, **options: Any) -> list[int]:
        torch.manual_seed(0)
        order = list(super()._get_train_sampler(*arguments, **options))  # type: ignore[misc]
        batches = [order[start : start + ROWS] for start in range(0, len(order) - ROWS + 1, ROWS)]
        some = batches[:: self.every]
        return [row for batch in some[: len(some) - len(some) % self.turn] for row in batch]


def options_of(order: dict[str, Any]) -> dict[str, Any]:
    """The arguments that trainers have in common: batches of ``ROWS``, bf16 weights, a constant rate, no files."""
    return {
        "output_dir": order["directory"],
        "per_device_train_batch_size": ROWS,
        "num_train_epochs": order["epochs"],
        "train_sampling_strategy": order["strategy"],
        "max_length": order["longest"],
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(trainer: Any, pairs: int) -> None:
    """Say which rows the epoch has, and train in turns."""
    weights = {parameter.dtype for parameter in trainer.model.parameters()}
    assert weights == {torch.bfloat16}, weights
    assert len(trainer.train_dataset) == pairs, "a pair was left out"
    answer(rows=list(trainer._get_train_sampler()))
    trainer.train()


def begin(trainer: Any, order: dict[str, Any]) -> Turns:
    """Set up a class of trainer for an order; returns the callback that it needs."""
    trainer.every, trainer.turn = order["every"], order["turn"]
    Turns.losses = trainer.losses = []
    return Turns()
