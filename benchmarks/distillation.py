"""On-policy distillation in the generated world: what a student gains that starts as SFT and is taught by a policy of PPO.

    python -m benchmarks.distillation --root DIR [--seeds 4 5 6] [--keep]

Teachers are the policies of ``world-ppo`` that ``benchmarks.equal_kl_seeds`` has trained in ``DIR``; missing ones are trained
first. The student learns by the recipe ``world-distill``, from nothing but its teacher. Gold and KL are those of the run's own
evaluations, on 300 held-out prompts. The command can be stopped and repeated at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ensembles import run_job
from benchmarks.equal_kl_seeds import SEEDS, overrides
from benchmarks.figures import REFERENCE, Figure, Figures, record, table
from benchmarks.learning_runs import Piece, evaluations, run_piece
from rlhf_ray import environment

TEACHER, STUDENT = "world-ppo", "world-distill"


def run_seed(root: Path, seed: int) -> None:
    """Train teacher and student of a seed where they are not there yet."""
    home = root / f"seed-{seed}"
    for name in ("sft", "rm"):
        run_piece(root, Piece(seed, name))
    run_job(home, seed, TEACHER, TEACHER, overrides(home, TEACHER, quick=False))
    models = [f"policy.model.path={home}/sft/final", f"reference.model.path={home}/{TEACHER}/final"]
    run_job(home, seed, STUDENT, STUDENT, [*models, "rollout.backend=transformers"])


def figures(root: Path, seeds: Sequence[int]) -> Figures:
    """Gold and the KL from the teacher, before and after, and the teacher's own gold."""
    students = [evaluations(root / f"seed-{seed}" / STUDENT)[-1] for seed in seeds]
    teachers = [evaluations(root / f"seed-{seed}" / TEACHER)[-1] for seed in seeds]
    label = (
        "on-policy distillation of world-ppo into SFT, 60 steps of 128 answers, by transformers, 300 held-out prompts"
    )
    rows = {
        "gold_start": ("score", "mean gold of SFT", True, students),
        "gold": ("score", "mean gold of the student", True, students),
        "gold_win_rate": ("share", "gold win rate of the student over SFT", True, students),
        "kl_start": ("nats", "KL from SFT to the teacher (k1, an answer)", False, students),
        "kl": ("nats", "KL from the student to the teacher (k1, an answer)", False, students),
    }
    found = {
        f"distill.{name}": Figure.worst(
            [run[f"evaluation/{name}"] for run in runs], unit, f"{what}: {label}", higher_is_better=higher
        )
        for name, (unit, what, higher, runs) in rows.items()
    }
    gold = [run["evaluation/gold"] for run in teachers]
    return found | {"distill.gold_teacher": Figure.worst(gold, "score", f"mean gold of the teacher: {label}")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the figures, and keep them where asked to."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.distillation", description="on-policy distillation of PPO into SFT"
    )
    parser.add_argument("--root", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--keep", action="store_true", help="write the figures into results/reference.json")
    options = parser.parse_args(arguments)
    environment.prepare()
    for seed in options.seeds:
        run_seed(options.root, seed)
    measured = figures(options.root, options.seeds)
    print(table(measured))
    if options.keep:
        record(measured, REFERENCE)


if __name__ == "__main__":
    main()
