"""TRL 1.12's PPOTrainer, which says how long each of its steps takes, in an environment of its own.

    python ppo_trl.py

The first line on standard input is an order: the directories of the policy and the reward model, the token ids of the
prompts, the number of steps, what a step does, and whether bf16 comes from the weights or from autocast. The answer holds the
seconds of every step.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(sys.prefix) / "trl-1.12"))

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


def answer(**content: Any) -> None:
    print(json.dumps(content), flush=True)


class Stopwatch(TrainerCallback):
    """The time at which each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    answer(imported=True)
    order = json.loads(sys.stdin.readline())
    dtype = torch.float32 if order["autocast"] else torch.bfloat16
    policy, reference = (AutoModelForCausalLM.from_pretrained(order["policy"], dtype=dtype) for _ in range(2))
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(order["reward"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    config = PPOConfig(
        output_dir=order["directory"],
        # One micro-batch an update, so that the optimizer steps as often as it is asked to.
        per_device_train_batch_size=order["samples"],
        gradient_accumulation_steps=1,
        num_mini_batches=order["updates"],
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=order["samples"],
        total_episodes=order["samples"] * order["steps"],
        response_length=order["new_tokens"],
        temperature=1.0,
        learning_rate=order["learning_rate"],
        kl_coef=order["kl_coefficient"],
        bf16=order["autocast"],
        gradient_checkpointing=False,
        num_sample_generations=0,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    stopwatch = Stopwatch()
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(order["policy"]),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in order["prompts"]]),
        eval_dataset=Dataset.from_list([{"input_ids": ids} for ids in order["prompts"][: order["samples"]]]),
        callbacks=[stopwatch],
    )
    trainer.train()
    ends = stopwatch.ends
    answer(seconds=[end - start for start, end in pairwise(ends)])


if __name__ == "__main__":
    main()
