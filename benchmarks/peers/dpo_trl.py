"""TRL's DPOTrainer, which runs some updates a turn and waits in between, in an environment of its own.

    python dpo_trl.py

The first line on standard input is an order: the directory of the model, pairs as the token ids of a prompt and two answers,
the sampling strategy, ``every`` (run one batch in so many) and the updates of a turn. The answer lists the pairs that it will
run. Every further line ``{"updates": n}`` is answered with the seconds and losses of n updates. The reference is a second
model, which runs in every update, as is TRL's default.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl_turns import OneInSome, answer, begin, options_of, run


class Trainer(OneInSome, DPOTrainer):
    """TRL's own, in turns, over rows that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        return dataset


def main() -> None:
    answer(imported=True)
    order = json.loads(sys.stdin.readline())
    pairs = order["pairs"]
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype="bfloat16")
    turns = begin(Trainer, order)
    config = DPOConfig(**options_of(order), beta=0.1)
    run(Trainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[turns]), len(pairs))


if __name__ == "__main__":
    main()
