"""TRL's SFTTrainer, which runs some updates a turn and waits in between, in an environment of its own.

    python sft_trl.py

The first line on standard input is an order: the directory of the model, rows as the token ids of a prompt and its answer, the
sampling strategy, ``every`` (run one batch in so many) and the updates of a turn. The answer lists the rows that it will run.
Every further line ``{"updates": n}`` is answered with the seconds and losses of n updates. Answers alone are learned.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from trl_turns import OneInSome, answer, begin, options_of, run


class Trainer(OneInSome, SFTTrainer):
    """TRL's own, in turns."""


def main() -> None:
    answer(imported=True)
    order = json.loads(sys.stdin.readline())
    pairs = order["pairs"]
    rows = [{"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in pairs]
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype="bfloat16")
    turns = begin(Trainer, order)
    config = SFTConfig(**options_of(order), completion_only_loss=True)
    run(Trainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[turns]), len(pairs))


if __name__ == "__main__":
    main()
