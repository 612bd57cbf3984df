"""Runs of each kind of training at their smallest, in this process, which tests break and resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping

STEPS = 2
SHARED = ["monitoring.ray_metrics=false", "run.deterministic=true", "run.name=late"]
TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
JOBS = {
    "ppo": (TINY_PPO, [
        "policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1", "steps=2",
        "critic=null", "reference=null", "algorithm.name=grpo", "rollout.max_new_tokens=4", "checkpoint.every_steps=null",
        "data.world={prompts: 8, evaluation_prompts: 2}", "evaluation={prompts: 2}",
        "batch={prompts_per_step: 2, samples_per_prompt: 2, sequences_per_update: 4, max_tokens_per_micro_batch: 512}",
    ]),
    "sft": ("demo-sft", [
        "policy.model.make.shape=llama-tiny", "policy.ranks=1", "data.world.demonstrations=16", "epochs=0.5",
        "batch.sequences_per_update=4",
    ]),
    "dpo": ("demo-dpo", [
        "policy.model={make: {shape: llama-tiny, tokenizer_from: world}, dtype: fp32}", "policy.ranks=1", "data.cache=null",
        "data.world={pairs: 8, evaluation_pairs: 4}", "batch.pairs_per_update=4",
    ]),
    "rm": ("demo-rm", [
        "reward.ranks=1", "batch.pairs_per_update=4", "epochs=1",
    ]),
}  # fmt: skip
FUNCTION = """
import pathlib

def wordy(responses):
    if pathlib.Path(__file__).with_name("away").exists():
        raise ConnectionError("the judge is away")
    return [float(len(response)) for response in responses]
"""


def config_of(kind: str, root: Path, *overrides: str) -> Any:
    """The config of a run of two steps, called ``late``, below ``root``."""
    recipe, settings = JOBS[kind]
    if kind == "ppo":
        (root / "mine.py").write_text(FUNCTION)
        settings = [*settings, f"reward={{function: '{root}/mine.py:wordy', hold_s: 0.0}}"]
    if kind == "rm":
        rows = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(12)]
        (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        make = f"{{shape: llama-tiny, tokenizer_from: {root}/pairs.jsonl, vocabulary: 300}}"
        model = f"reward.model={{make: {make}, dtype: fp32, head_init: inv_sqrt}}"
        settings = [*settings, model, f"data={{path: {root}/pairs.jsonl, evaluation_fraction: 0.34}}"]
    return load_config(recipe, [f"run.root={root}", *SHARED, *settings, *overrides], kind=kind)


def train(config: Any) -> RunDirectory:
    """Train it to its end."""
    train_new_run(dump_config(config), place=ThisProcess(config.cluster))
    return RunDirectory.open(Path(config.run.root) / config.run.name)


def ask_to_stop() -> None:
    """As `kill` does."""
    os.kill(os.getpid(), signal.SIGTERM)


def forget_the_stop() -> None:
    """This process was not asked to stop."""
    stopping._stop.clear()
    stopping._received.clear()
    stopping._training.clear()


@contextmanager
def signals_as_before() -> Iterator[None]:
    """Whatever runs in the block, this process then handles signals as before and was not asked to stop."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        forget_the_stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
