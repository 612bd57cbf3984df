"""The demo: supervised fine-tuning, a reward model and PPO on the generated world, in one Ray session.

Invariants: the three jobs are ordinary ones from the shipped recipes, and each leaves an ordinary run directory. The gold
score, which is the truth of the generated world, is shown beside the learned reward and is never trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_ray import environment
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.jobs.reward_model import RewardModelConfig
from rlhf_ray.config.jobs.sft import SftConfig
from rlhf_ray.config.loading import AnyJob, load_job
from rlhf_ray.console import get_logger, say, table
from rlhf_ray.launch.driver import exit_code, new_run, run_trainer
from rlhf_ray.monitoring.memory import MemorySampler
from rlhf_ray.monitoring.report.summary import Figure, MemoryRecord
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import write_report

JOBS: tuple[type[TrainingJob], ...] = (SftConfig, RewardModelConfig, PpoConfig)
STARTS_FROM: Mapping[str, Mapping[str, str]] = {
    "rm": {"reward": "sft"},
    "ppo": {"policy": "sft", "reference": "sft", "critic": "rm", "reward": "rm"},
}
"""The job whose result each model of a job starts from, by the kind of the job and the key of the model's role."""
SAMPLES_SHOWN = 3
REPORT = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo in this process; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_ray.launch.demo")
    parser.add_argument("--root", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    environment.prepare()
    return exit_code(lambda: demo(Path(options.root), options.seed, options.overrides))


def demo(root: Path, seed: int, overrides: Sequence[str]) -> None:
    """Run all three jobs, print the closing table and write the report."""
    from rlhf_ray.actors.cluster import Cluster

    began = time.monotonic()
    runs: dict[str, RunDirectory] = {}
    first = job_config(SftConfig, root, seed, overrides)
    with MemorySampler() as memory, Cluster(first.cluster, first.run):
        for job in JOBS:
            config = job_config(job, root, seed, overrides)
            with new_run(config) as run:
                runs[config.kind] = run
                run_trainer(config, run, None)
        # Before the cluster is left: one that has died may end this process.
        seconds = time.monotonic() - began
        peak = memory.peak
        history = tuple((round(at, 1), round(use.total_gb, 3)) for at, use in memory.history)
        record = MemoryRecord(round(peak.pss_gb, 3), round(peak.object_store_gb, 3), peak.processes, history)
        baseline = words_baseline(job_config(RewardModelConfig, root, seed, overrides))
        finish(root, runs, baseline, seconds, record)


def job_config(job: type[AnyJob], root: Path, seed: int, overrides: Sequence[str]) -> AnyJob:
    """The recipe of one job, with its run below ``root`` and the models that the jobs before it wrote."""
    kind = job.kind_name()
    models = [f"{role}.model.path={root}/{origin}/final" for role, origin in STARTS_FROM.get(kind, {}).items()]
    own = [override.removeprefix(f"{kind}.") for override in overrides if override.startswith(f"{kind}.")]
    place = [f"run.name={kind}", f"run.root={root}", f"run.seed={seed}"]
    return load_job(job, f"demo-{kind}", [*place, *models, *own], files=True)


def finish(root: Path, runs: Mapping[str, RunDirectory], baseline: float, seconds: float, memory: MemoryRecord) -> None:
    """Print the closing table and some answers, and write ``report.html``.

    ``baseline`` is the accuracy of a model that knows words and lengths alone, on the pairs of the reward model.
    """
    closing = runs["ppo"].summary()
    rows = (
        ("reward model, held-out accuracy without noise", last_figure(runs["rm"], "evaluation/accuracy")),
        ("bag of words and length, the same", f"{baseline:.3f}"),
        ("SFT, gold mean", last_figure(runs["ppo"], "evaluation/gold_start")),
        ("PPO, gold mean", last_figure(runs["ppo"], "evaluation/gold")),
        ("PPO, gold win rate over SFT", last_figure(runs["ppo"], "evaluation/gold_win_rate")),
        ("PPO, KL in nats", last_figure(runs["ppo"], "evaluation/kl", digits=2)),
        ("time", f"{seconds:.0f} s"),
        ("memory at its peak", f"{memory.pss_gb + memory.object_store_gb:.2f} GB in {memory.processes} processes"),
    )
    say(table("the demo", ("what", "figure"), rows))
    figures = tuple(Figure(name, value) for name, value in rows)
    runs["ppo"].write_summary(replace(closing, figures=figures, memory=memory))
    for sample in closing.samples[:SAMPLES_SHOWN]:
        say(f"\n{sample.prompt.strip()}")
        for answer in sample.answers:
            say(f"  {answer.label:>5} (gold {answer.scores.get('gold', 0.0):.1f}): {answer.text.strip()}")
    report = write_report([runs["ppo"]], root / REPORT)
    for kind in ("sft", "rm"):
        write_report([runs[kind]])
    get_logger("demo").info("report: %s", report)


def last_figure(run: RunDirectory, name: str, digits: int = 3) -> str:
    """The last value that a run logged for a metric; a dash where its settings let it log none."""
    return next((f"{float(line[name]):.{digits}f}" for line in reversed(run.metrics.read()) if name in line), "-")


def words_baseline(config: RewardModelConfig) -> float:
    """The accuracy of logistic regression on length and words of the answers, on the same generated pairs."""
    from rlhf_ray.evaluation.baseline import bag_of_words_baseline
    from rlhf_ray.world.generate import World

    settings = config.data.world
    assert settings is not None, "the command refuses a demo without the generated world"
    world = World(settings.seed, settings.raters)
    training = world.preferences(settings.pairs)
    held_out = world.preferences(settings.evaluation_pairs, split="evaluation", flipped=0.0)
    return bag_of_words_baseline(_plain_texts(training), _plain_texts(held_out))


def _plain_texts(pairs: Iterable[PreferencePair]) -> list[tuple[str, str]]:
    """Both answers of each pair; those of the generated world are texts, never conversations."""
    return [(str(pair.chosen), str(pair.rejected)) for pair in pairs]


if __name__ == "__main__":
    sys.exit(main())
