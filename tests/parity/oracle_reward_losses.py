"""What TRL's and OpenRLHF's reward losses are: run in the environment of the independent implementations.

    python oracle_reward_losses.py DIRECTORY

Reads ``inputs.npz`` there (reward_losses.prepare wrote it) and writes ``values.npz`` and ``versions.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openrlhf_source
import torch
from trl import RewardTrainer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def trl(margin: torch.Tensor | None, centering: float | None) -> Loss:
    """``RewardTrainer.compute_loss`` of a model whose scores are given."""

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
        trainer = SimpleNamespace(
            accelerator=accelerator, args=SimpleNamespace(center_rewards_coefficient=centering), _tp_size=1,
            _metrics={"train": Metrics(), "eval": Metrics()}, _total_train_tokens=0,
            model=SimpleNamespace(training=True),
        )  # fmt: skip
        scores = torch.cat([chosen, rejected])[:, None]
        ids = torch.ones(len(scores), 1, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": ids} | ({} if margin is None else {"margin": margin})
        return RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)

    return loss


class Metrics(dict):
    def __missing__(self, key: str) -> list[Any]:
        self[key] = []
        return self[key]


def main(directory: Path) -> None:
    with np.load(directory / "inputs.npz") as arrays:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    margin, losses = inputs["margin"], openrlhf_source.module("models.loss")
    oracles: dict[str, Loss] = {
        "openrlhf sigmoid": losses.PairWiseLoss(),
        "openrlhf sigmoid with margin": lambda chosen, rejected: losses.PairWiseLoss()(chosen, rejected, margin),
        "openrlhf logexp": losses.LogExpLoss(),
        "trl sigmoid": trl(None, None),
        "trl sigmoid with margin": trl(margin, None),
        "trl sigmoid with margin and centering": trl(margin, 0.01),
    }
    values = {}
    for name, loss in oracles.items():
        chosen, rejected = (inputs[side].clone().requires_grad_() for side in ("chosen", "rejected"))
        value = loss(chosen, rejected)
        value.backward()
        values |= {f"{name}/loss": value.detach(), f"{name}/chosen gradient": chosen.grad}
        values |= {f"{name}/rejected gradient": rejected.grad}
    np.savez(directory / "values.npz", **{name: value.numpy() for name, value in values.items()})
    versions = {name: version(name) for name in ("trl", "torch")} | {"openrlhf": "0.11.2"}
    (directory / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
