"""TRL's RewardTrainer, which runs some updates a turn and waits in between, in an environment of its own.

    python reward_training_trl.py

The first line on standard input is an order: the directory of the model, the token ids of the pairs, the sampling strategy,
``every`` (run one batch in so many) and the updates of a turn. The answer lists the pairs that it will run. Every further
line ``{"updates": n}`` is answered with the seconds and losses of n updates.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from trl import RewardConfig, RewardTrainer
from trl_turns import OneInSome, answer, begin, options_of, run


class Trainer(OneInSome, RewardTrainer):
    """TRL's own, in turns."""


def main() -> None:
    answer(imported=True)
    order = json.loads(sys.stdin.readline())
    pairs = order["pairs"]
    rows = [{"chosen_ids": c, "rejected_ids": r, "length": max(len(c), len(r))} for c, r in pairs]
    config = RewardConfig(**options_of(order), model_init_kwargs={"dtype": "bfloat16"})
    turns = begin(Trainer, order)
    run(
        Trainer(model=order["model"], args=config, train_dataset=Dataset.from_list(rows), callbacks=[turns]), len(pairs)
    )


if __name__ == "__main__":
    main()
