"""Small reward-model runs in one process, and as a program that can be killed: ``python reward_runs.py DIRECTORY``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray import environment

CONFIG: dict[str, Any] = {
    "kind": "rm",
    "run": {"name": "tiny", "deterministic": True, "seed": 3},
    "reward": {
        "model": {"make": {"shape": "llama-tiny", "tokenizer_from": "world"}, "dtype": "fp32", "head_init": "inv_sqrt"},
        "engine": {"optimizer": {"learning_rate": 3e-3}},
    },
    "data": {"world": {"pairs": 60, "evaluation_pairs": 40}, "max_tokens": 96},
    "batch": {"pairs_per_update": 8, "max_tokens_per_micro_batch": 512},
    "epochs": 2.0,
    "evaluation": {"every_steps": 4},
    "checkpoint": {"every_steps": 3},
    "monitoring": {"ray_metrics": False},
}
RECORD = "pairs.jsonl"


def config_of(root: Path, *overrides: str) -> Any:
    """The config above, its run below ``root``."""
    from rlhf_ray.config.loading import load_config

    root.mkdir(parents=True, exist_ok=True)
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return load_config(path, [f"run.root={root}", *overrides], kind="rm")


def train(config: Any, *, resume: bool = False) -> Any:
    """Run it here, from its start or its last commit; returns the run directory, released."""
    from rlhf_ray.actors.this_process import ThisProcess
    from rlhf_ray.config.loading import dump_config
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.trainers.supervised.reward_model import train_reward_model

    path, checkpoint = Path(config.run.root) / config.run.name, None
    if resume:
        run, checkpoint = RunDirectory.resume(path, config.checkpoint.keep)
    else:
        run = RunDirectory.create(path, dump_config(config), config.checkpoint.keep)
    try:
        train_reward_model(config, run, checkpoint, place=ThisProcess(config.cluster))
    finally:
        run.release()
    return run


def record_pairs(file: Path) -> None:
    """From now on, keep a line of every update's pairs."""
    from rlhf_ray.trainers.supervised import reward_model

    make = reward_model.make_pair_batch

    def recording(pairs: Sequence[Any]) -> Any:
        with file.open("a") as lines:
            lines.write(json.dumps([[list(map(int, side)) for side in (p.chosen, p.rejected)] for p in pairs]) + "\n")
        return make(pairs)

    reward_model.make_pair_batch = recording


if __name__ == "__main__":
    environment.prepare()
    place = Path(sys.argv[1])
    settings = config_of(place)
    record_pairs(place / RECORD)
    train(settings)
