"""Part ``demo``: what ``make demo`` makes of three seeds, how long it takes and how much memory.

Invariants: each seed is the whole command in a process of its own, with nothing changed. Quality is that of the last
weights on held-out prompts; time is wall clock from the command's start to its end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import Figure, Figures

SEEDS = (0, 1, 2)
TIMEOUT_S = 1800
BAG_OF_WORDS = "bag of words and length, the same"
"""The demo's own label of the accuracy that logistic regression reaches."""
BEST_OF_N = (
    "best of n samples of SFT by the learned reward, n the largest power of two up to 64 at no more KL than PPO's"
)
DESCRIPTIONS = {
    "demo.reward_accuracy": ("share", True, "reward model on 1,000 held-out pairs without noise"),
    "demo.bag_of_words_accuracy": ("share", True, "logistic regression on length and bag of words, the same pairs"),
    "demo.sft_gold_mean": ("score", True, "mean gold of SFT on 300 held-out prompts"),
    "demo.gold_mean": ("score", True, "mean gold of PPO on 300 held-out prompts"),
    "demo.gold_win_rate": ("share", True, "PPO over SFT by gold on 300 held-out prompts, ties half"),
    "demo.kl": ("nats", False, "KL of PPO from SFT, k1, mean of held-out samples"),
    "demo.best_of_n.gold_win_rate": ("share", True, f"{BEST_OF_N}: gold win rate over SFT"),
    "demo.best_of_n.kl": ("nats", False, f"{BEST_OF_N}: log n - (n - 1) / n"),
    "demo.best_of_n.samples": ("samples", False, f"{BEST_OF_N}: n"),
    "demo.memory_gb": ("GB", False, "peak of all processes (PSS) and the object store, sampled each second"),
    "demo.minutes": ("minutes", False, "wall clock of the whole command on two cores"),
}
"""Unit, whether higher is better, and method of each figure."""
METHOD = "make demo (SFT, reward model and PPO in one Ray session on CPU)"
QUICK = [
    "sft.data.world.demonstrations=64", "sft.policy.model.make.shape=llama-tiny",
    "rm.data.world.pairs=64", "rm.data.world.evaluation_pairs=32",
    "ppo.steps=2", "ppo.batch.prompts_per_step=8", "ppo.batch.sequences_per_update=8", "ppo.evaluation.prompts=8",
    "ppo.evaluation.best_of=4",
]  # fmt: skip


def measure(quick: bool = False) -> Figures:
    """Run the demo with every seed."""
    with tempfile.TemporaryDirectory() as directory:
        roots = {seed: Path(directory) / str(seed) for seed in (SEEDS[:1] if quick else SEEDS)}
        return figures([run_demo(root, seed, QUICK if quick else []) for seed, root in roots.items()])


def run_demo(root: Path, seed: int, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Run the command once; returns the numbers of this seed by figure."""
    command = [sys.executable, "-m", "rlhf_ray", "demo", "--seed", str(seed), "--root", str(root), *overrides]
    started_at = time.monotonic()
    subprocess.run(command, check=True, timeout=TIMEOUT_S, cwd=Path(__file__).parents[1])
    return read_numbers(root) | {"demo.minutes": (time.monotonic() - started_at) / 60}


def read_numbers(root: Path) -> dict[str, float]:
    """The numbers of a finished demo by figure, all but its time, from the run directories below ``root``."""
    from rlhf_ray.monitoring.report.summary import BestOf
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.trainers.ppo.evaluation import best_within_kl

    reward_model, ppo = RunDirectory(root / "rm"), RunDirectory(root / "ppo")
    summary = ppo.summary()
    if summary.memory is None:
        raise ValueError(f"{ppo.path} holds no memory figures: the demo did not finish")
    last = [line for line in ppo.metrics.read() if "evaluation/gold" in line][-1]
    accuracies = [line["evaluation/accuracy"] for line in reward_model.metrics.read() if "evaluation/accuracy" in line]
    stored = json.loads((ppo.path / "evaluation" / "start.json").read_text())["best_of"]
    best_of_n = [BestOf(**row) for row in stored]
    affordable = best_within_kl(best_of_n, last["evaluation/kl"]) or best_of_n[0]
    return {
        "demo.reward_accuracy": accuracies[-1],
        "demo.bag_of_words_accuracy": next(float(row.value) for row in summary.figures if row.label == BAG_OF_WORDS),
        "demo.sft_gold_mean": last["evaluation/gold_start"],
        "demo.gold_mean": last["evaluation/gold"],
        "demo.gold_win_rate": last["evaluation/gold_win_rate"],
        "demo.kl": last["evaluation/kl"],
        "demo.best_of_n.gold_win_rate": affordable.win_rate,
        "demo.best_of_n.kl": affordable.kl,
        "demo.best_of_n.samples": float(affordable.n),
        "demo.memory_gb": summary.memory.pss_gb + summary.memory.object_store_gb,
    }


def figures(seeds: Sequence[Mapping[str, float]]) -> Figures:
    """The figures of all seeds, from the numbers of each."""
    return {
        name: Figure.worst(
            [numbers[name] for numbers in seeds], unit, f"{METHOD}: {method}", higher_is_better=higher_is_better
        )
        for name, (unit, higher_is_better, method) in DESCRIPTIONS.items()
    }
