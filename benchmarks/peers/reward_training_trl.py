"""TRL's RewardTrainer, which runs some updates a turn and waits in between, in an environment of its own.

    python reward_training_trl.py

The first line on standard input is an order: the directory of the model, the token ids of the pairs, the sampling strategy,
``every`` (run one batch in so many) and the updates of a turn. The answer lists the pairs that it will run. Every further
line ``{"updates": n}`` is answered with the seconds and losses of n updates.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

ROWS = 8


def answer(**content: Any) -> None:
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


class OneInSome(RewardTrainer):
    """Runs one in ``every`` batches that the strategy makes: a short epoch with the same mix of lengths."""

    every = turn = 1
    losses: list[float]

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        self.losses.append(loss.item())
        return loss

    def _get_train_sampler(self, *arguments: Any, **options: Any) -> list[int]:
        torch.manual_seed(0)
        order = list(super()._get_train_sampler(*arguments, **options))
        batches = [order[start : start + ROWS] for start in range(0, len(order) - ROWS + 1, ROWS)]
        some = batches[:: self.every]
        return [row for batch in some[: len(some) - len(some) % self.turn] for row in batch]


def main() -> None:
    answer(imported=True)
    order = json.loads(sys.stdin.readline())
    pairs = order["pairs"]
    rows = [{"chosen_ids": c, "rejected_ids": r, "length": max(len(c), len(r))} for c, r in pairs]
    config = RewardConfig(
        output_dir=order["directory"],
        per_device_train_batch_size=ROWS,
        num_train_epochs=order["epochs"],
        train_sampling_strategy=order["strategy"],
        max_length=order["longest"],
        model_init_kwargs={"dtype": "bfloat16"},
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    OneInSome.every, OneInSome.turn = order["every"], order["turn"]
    Turns.losses = OneInSome.losses = []
    trainer = OneInSome(model=order["model"], args=config, train_dataset=Dataset.from_list(rows), callbacks=[Turns()])
    weights = {parameter.dtype for parameter in trainer.model.parameters()}
    assert weights == {torch.bfloat16}, weights
    assert len(trainer.train_dataset) == len(pairs), "a pair was left out"
    answer(rows=list(trainer._get_train_sampler()))
    trainer.train()


if __name__ == "__main__":
    main()
