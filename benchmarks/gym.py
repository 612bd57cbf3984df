"""Part ``gym``: what GRPO learns on a task of reasoning-gym, in one turn and where full marks need a second one.

Invariants: the recipes are the shipped ones (``gym-sft``, ``gym-grpo``, ``gym-turns-grpo``); no question of the evaluation
is in the rows that anything was trained on; an answer counts as right only with full marks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, Figures
from rlhf_ray.environments import reasoning_gym

FAMILY, SETTINGS = "spell_backward", {"max_word_len": 5}
SIZES = {"demonstrations": 2000, "train": 2000, "test": 200}
END = "<eos>"
"""The text of the token that ends an answer of the made policy."""
QUICK = ["policy.model.make.shape=llama-tiny", "data.max_rows=64", "epochs=1"]
QUICK_GRPO = ["steps=1", "evaluation.prompts=4", "batch.prompts_per_step=4"]
RUNS = {"gym.one_turn": "gym-grpo", "gym.two_turns": "gym-turns-grpo"}


def measure(quick: bool = False) -> Figures:
    """Train each policy and compare how often it is right before and after GRPO."""
    figures: Figures = {}
    for name, recipe in RUNS.items():
        with tempfile.TemporaryDirectory() as directory:
            figures |= learn(name, recipe, Path(directory), quick=quick)
    return figures


def learn(name: str, recipe: str, root: Path, *, quick: bool) -> Figures:
    """Figures of one recipe: rows, supervised fine-tuning, GRPO."""
    two = recipe == "gym-turns-grpo"
    reasoning_gym.write_files(FAMILY, root / "gym", SIZES, END if two else None, **SETTINGS)
    sft = "gym-turns-sft" if two else "gym-sft"
    began = time.monotonic()
    _train(root, "sft", "gym-sft", f"run.name={sft}", *(["epochs=3"] if two else []), *(QUICK if quick else []))
    start = time.monotonic()
    _train(root, "ppo", recipe, "rollout.backend=transformers", *(QUICK_GRPO if quick else []))
    seconds = time.monotonic() - start
    rows = [json.loads(line) for line in (root / "runs" / recipe / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "evaluation/pass_at_1" in row][-1]
    method = (
        f"share of {SIZES['test']} unseen questions of {FAMILY} (words of 3 to 5 letters), two sampled answers each, that get "
        "full marks; "
        f"GRPO in one process after supervised fine-tuning of {start - began:.0f} s on {SIZES['demonstrations']} others"
    )
    return {
        f"{name}.start": Figure(last["evaluation/pass_at_1_start"], "share", True, f"{method}; before GRPO"),
        f"{name}.right": Figure(last["evaluation/pass_at_1"], "share", True, f"{method}; after GRPO"),
        f"{name}.seconds": Figure(seconds, "s", False, f"{method}; the whole run of GRPO, evaluations included"),
    }


def _train(root: Path, kind: str, recipe: str, *overrides: str) -> None:
    command = [sys.executable, "-m", "rlhf_ray", "train", kind, recipe, *overrides, "--in-process"]
    done = subprocess.run(command, cwd=root, timeout=900)
    if done.returncode != 0:
        raise RuntimeError(f"{recipe} ended with {done.returncode}")
