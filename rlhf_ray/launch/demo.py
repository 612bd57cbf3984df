"""The demo: supervised fine-tuning, a reward model and PPO over the generated world, in one Ray session.

Always true: the three jobs are ordinary ones, from the shipped recipes, and each leaves an ordinary run directory; the gold
score is shown beside the learned reward and is trained on nowhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_ray import environment
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.schema import RewardModelConfig, TrainingConfig
from rlhf_ray.console import get_logger, say, table
from rlhf_ray.launch.driver import drive, exit_code, new_run_directory, training_config
from rlhf_ray.monitoring.memory import MemorySampler
from rlhf_ray.monitoring.report.summary import Figure, MemoryRecord
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import write_report

JOBS = ("sft", "rm", "ppo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo in this process; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_ray.launch.demo")
    parser.add_argument("--root", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    environment.prepare()
    return exit_code(lambda: demo(Path(given.root), given.seed, given.overrides))


def demo(root: Path, seed: int, overrides: Sequence[str]) -> None:
    """All three jobs, the closing table and the report."""
    from rlhf_ray.actors.cluster import Cluster

    began = time.monotonic()
    runs: dict[str, RunDirectory] = {}
    configs: dict[str, TrainingConfig] = {}
    first = job_config("sft", root, seed, overrides)
    with MemorySampler() as memory, Cluster(first.cluster, first.run):
        for job in JOBS:
            configs[job] = job_config(job, root, seed, overrides)
            runs[job] = new_run_directory(configs[job])
            drive(configs[job], runs[job], None)
            runs[job].release()
    took = time.monotonic() - began
    peak = memory.peak
    history = tuple((round(at, 1), round(use.total_gb, 3)) for at, use in memory.history)
    record = MemoryRecord(round(peak.pss_gb, 3), round(peak.object_store_gb, 3), peak.processes, history)
    finish(root, runs, configs, took, record)


def job_config(job: str, root: Path, seed: int, overrides: Sequence[str]) -> TrainingConfig:
    """The recipe of one job, its run below ``root``, reading what the jobs before it wrote."""
    before = {
        "sft": [],
        "rm": [f"reward.model.path={root}/sft/final"],
        "ppo": [
            f"{role}.model.path={root}/{run}/final"
            for role, run in (("policy", "sft"), ("reference", "sft"), ("critic", "rm"), ("reward", "rm"))
        ],
    }[job]
    own = [override.removeprefix(f"{job}.") for override in overrides if override.startswith(f"{job}.")]
    place = [f"run.name={job}", f"run.root={root}", f"run.seed={seed}"]
    return training_config(load_config(f"demo-{job}", [*place, *before, *own], kind=job, files=True))


def finish(
    root: Path, runs: dict[str, RunDirectory], configs: dict[str, TrainingConfig], took: float, memory: MemoryRecord
) -> None:
    """Say how it went, and write ``report.html``."""
    closing = runs["ppo"].summary()
    accuracy = last_figure(runs["rm"], "evaluation/accuracy")
    baseline = words_baseline(configs["rm"])
    rows = (
        ("reward model, held-out accuracy without noise", f"{accuracy:.3f}"),
        ("bag of words and length, the same", f"{baseline:.3f}"),
        ("SFT, gold mean", f"{last_figure(runs['ppo'], 'evaluation/gold_start'):.3f}"),
        ("PPO, gold mean", f"{last_figure(runs['ppo'], 'evaluation/gold'):.3f}"),
        ("PPO, gold win rate over SFT", f"{last_figure(runs['ppo'], 'evaluation/gold_win_rate'):.3f}"),
        ("PPO, KL in nats", f"{last_figure(runs['ppo'], 'evaluation/kl'):.2f}"),
        ("time", f"{took:.0f} s"),
        ("memory at its peak", f"{memory.pss_gb + memory.object_store_gb:.2f} GB in {memory.processes} processes"),
    )
    say(table("the demo", ("what", "figure"), rows))
    headline = tuple(Figure(name, value) for name, value in rows)
    runs["ppo"].write_summary(replace(closing, figures=headline, memory=memory))
    for sample in closing.samples[:3]:
        say(f"\n{sample.prompt.strip()}")
        for answer in sample.answers:
            say(f"  {answer.label:>5} (gold {answer.scores.get('gold', 0.0):.1f}): {answer.text.strip()}")
    report = write_report([runs["ppo"]], root / "report.html")
    for job in JOBS[:2]:
        write_report([runs[job]])
    get_logger("demo").info("report: %s", report)


def last_figure(run: RunDirectory, name: str) -> float:
    """The last value of a metric that a run logged."""
    return float(next(line[name] for line in reversed(run.metrics.read()) if name in line))


def words_baseline(config: TrainingConfig) -> float:
    """What logistic regression on length and words of the answers gets on the same pairs."""
    from rlhf_ray.evaluation import bag_of_words_baseline
    from rlhf_ray.world.generate import World

    assert isinstance(config, RewardModelConfig) and config.data.world is not None
    made = config.data.world
    world = World(made.seed, made.raters)
    training = [(pair.chosen, pair.rejected) for pair in world.preferences(made.pairs)]
    held_out = world.preferences(made.evaluation_pairs, split="evaluation", flipped=0.0)
    return bag_of_words_baseline(training, [(pair.chosen, pair.rejected) for pair in held_out])


if __name__ == "__main__":
    sys.exit(main())
