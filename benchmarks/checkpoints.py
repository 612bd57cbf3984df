"""Part ``checkpoints``: what training waits for a checkpoint, against an earlier build that wrote it before it went on.

Invariants: both builds train the same made model on the same demonstrations, with the same ranks and the same two cores, one
after the other. The last commit of a run, for which nothing trains on, does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.figures import Figure, Figures
from benchmarks.ppo import EARLIER, ROOT, checkout

SEQUENCES, UPDATES, RANKS = 64, 84, 2
EARLIER_UPDATES, EARLIER_EVERY = 8, 2
SETTINGS = (
    "policy.model.dtype=bf16", "policy.engine.zero=2", f"policy.ranks={RANKS}", f"batch.sequences_per_update={SEQUENCES}",
    "monitoring.ray_metrics=false",
)  # fmt: skip
BESIDE = 2
"""Updates after a save in which it may still be written."""
Steps = Sequence[dict[str, float]]


def measure(quick: bool = False) -> Figures:
    """How long training stands still for a commit, and what commits at the default interval take of the time of a run."""
    shape, updates = ("llama-tiny", 4) if quick else ("llama-14m", UPDATES)
    with TemporaryDirectory() as name:
        now = run(ROOT, Path(name), "now", shape, updates, *["checkpoint.every_steps=1"] * quick)
        if quick:
            return {"checkpoint.stall_seconds": Figure(stall(now), "s", False, "one commit of a tiny model")}
        with checkout(EARLIER) as root:
            every = f"checkpoint.every_steps={EARLIER_EVERY}"
            before = run(root, Path(name), "earlier", shape, EARLIER_UPDATES, every)
    what = f"SFT of a Llama of 14M in bf16, ZeRO-2 on {RANKS} ranks, {SEQUENCES} sequences an update, 2 cores"
    ours, theirs = stall(now), stall(before)
    return {
        "checkpoint.stall_vs_0_1": Figure(
            theirs / ours, "x", True,
            f"seconds that a commit of commit {EARLIER} takes, {theirs:.2f}, over those that training waits for one here, "
            f"{ours:.3f}; {what}; medians of {saves(before)} and {saves(now)}",
        ),
        "checkpoint.share_of_time": Figure(
            share_of_time(now), "share", False,
            f"of {sum(each['time/step'] for each in now):.0f} s of {len(now)} updates with {saves(now)} commits at the default "
            f"interval, what the update in which one is saved and the {BESIDE} after it, while it is written, take longer than "
            f"the others: medians; {what}",
        ),
    }  # fmt: skip


def run(root: Path, home: Path, name: str, shape: str, updates: int, *settings: str) -> list[dict[str, float]]:
    """The metrics of each update but the first of a run of the build below ``root``."""
    command = [
        sys.executable, "-m", "rlhf_ray", "train", "sft", "demo-sft", f"run.root={home}", f"run.name={name}",
        f"policy.model.make={{shape: {shape}, tokenizer_from: data}}", f"data.world.demonstrations={updates * SEQUENCES}",
        *SETTINGS, *settings,
    ]  # fmt: skip
    subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    lines = (home / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [each for each in map(json.loads, lines) if "time/step" in each][1:]


def stall(steps: Steps) -> float:
    """Seconds that training waits for a commit on the way."""
    return median(each["time/checkpoint"] for each in on_the_way(steps))


def saves(steps: Steps) -> int:
    """Commits on the way."""
    return len(on_the_way(steps))


def on_the_way(steps: Steps) -> Steps:
    """The updates in whose time a commit was made; that of the last update is not on the way."""
    return [each for each in steps[:-1] if "time/checkpoint" in each]


def share_of_time(steps: Steps) -> float:
    """The share of a run that commits take: what they make their own update and the next ones longer than all others are."""
    saved = [number for number, each in enumerate(steps[:-1]) if "time/checkpoint" in each]
    near = {number + after for number in saved for after in range(BESIDE + 1)}
    seconds = [each["time/step"] for each in steps]
    rest = median(value for number, value in enumerate(seconds[:-1]) if number not in near)
    longer = 0.0
    for after in range(BESIDE + 1):
        beside = [seconds[number + after] for number in saved if number + after < len(steps) - 1]
        longer += median(beside) - rest if beside else 0.0
    return len(saved) * longer / sum(seconds)
