"""Over-optimisation against an ensemble: PPO without the KL term against one reward model, and against several of them.

    python -m benchmarks.ensembles --root DIR [--seeds 0 1 2] [--pairs 19200] [--pieces N]

The same world, policy and recipe as the part ``learning`` (``WITHOUT_KL``), whose pieces it takes up where they lie in ``DIR``.
The reward models learn from the raters whom flattery wins over. They begin from the same policy and differ in their seeds: in
the fresh score head, in the pairs that they learn from, and in their order. It prints what share of its peak gold loses in
each run, and what the ensemble's share is of the single model's. The command can be stopped and repeated at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.learning_figures import gold_peak, over_optimised
from benchmarks.learning_runs import JUDGES, SHARED, WITHOUT_KL, begin, evaluations, finished
from rlhf_ray import environment

MEMBERS = 4
SINGLE, ENSEMBLE = "one", "ensemble"


def jobs(home: Path, seed: int, pairs: int, reduction: str, steps: int) -> list[tuple[str, str, list[str]]]:
    """The name, the recipe and the overrides of every job of one seed, in order."""
    members = [f"flattered_rm_{number}" for number in range(1, MEMBERS + 1)]
    sft = f"{home}/sft/final"
    learned = [
        (name, "world-rm", [*JUDGES["flattered_rm"], f"reward.model.path={sft}", f"data.world.pairs={pairs}",
                            f"run.seed={seed + 100 * number}", f"data.world.seed={seed + 100 * number}"])
        for number, name in enumerate(members)
    ]  # fmt: skip
    paths = [f"{home}/{name}/final" for name in members]
    start = [f"{role}.model.path={sft}" for role in ("policy", "reference")]
    ppo = [*start, f"critic.model.path={paths[0]}", f"reward.model.path={paths[0]}", *WITHOUT_KL, f"steps={steps}"]
    several = f"reward.ensemble=[{', '.join(paths[1:])}]"
    return [
        ("sft", "demo-sft", ["policy.ranks=1"]),
        *learned,
        (SINGLE, "demo-ppo", ppo),
        (f"{ENSEMBLE}_{reduction}", "demo-ppo", [*ppo, several, f"reward.reduction={reduction}"]),
    ]


def run_job(home: Path, seed: int, name: str, recipe: str, overrides: Sequence[str]) -> None:
    """Run one job in this process, without Ray; nothing where it has finished before."""
    from rlhf_ray.actors.this_process import ThisProcess
    from rlhf_ray.config.loading import dump_config, load_config
    from rlhf_ray.launch.driver import run_trainer

    if finished(home / name):
        return
    place = [f"run.root={home}", f"run.name={name}", f"run.seed={seed}", f"data.world.seed={seed}"]
    config = load_config(recipe, [*place, *SHARED, *overrides], files=True).to_train()
    run = begin(home / name, dump_config(config))
    run_trainer(config, run, None, place=ThisProcess(config.cluster))
    run.release()


def report(home: Path, names: Sequence[str]) -> str:
    """One line for each run of PPO that has finished, and what each loses over what the single model does."""
    lines, lost = [], {}
    for name in names:
        if not finished(home / name):
            continue
        run = evaluations(home / name)
        peak, end = gold_peak(run), run[-1]
        lost[name] = over_optimised(run)[0]
        share = f", {lost[name] / lost[SINGLE]:.2f} of the single model's" if lost.get(SINGLE) else ""
        lines.append(
            f"{home.name} {name}: gold {peak['evaluation/gold']:.3f} at its peak, {end['evaluation/gold']:.3f} at the end, "
            f"lost {lost[name]:.3f}{share}; KL {peak['evaluation/kl']:.1f} and {end['evaluation/kl']:.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the jobs that have not finished, and print what is known."""
    parser = argparse.ArgumentParser(prog="benchmarks.ensembles", description="over-optimisation against an ensemble")
    parser.add_argument("--root", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=19200, help="pairs that each reward model learns from")
    parser.add_argument("--steps", type=int, default=60, help="steps of PPO")
    parser.add_argument("--reduction", choices=("mean_minus_std", "minimum", "mean"), default="mean_minus_std")
    parser.add_argument("--pieces", type=int, help="run at most so many jobs")
    parser.add_argument("--only", nargs="+", help="run only jobs of these names")
    options = parser.parse_args(arguments)
    environment.prepare()
    left = options.pieces
    for seed in options.seeds:
        home = options.root / f"seed-{seed}"
        every = jobs(home, seed, options.pairs, options.reduction, options.steps)
        for name, recipe, overrides in every:
            if finished(home / name) or left == 0 or (options.only and name not in options.only):
                continue
            left = None if left is None else left - 1
            run_job(home, seed, name, recipe, overrides)
        print(
            report(home, [SINGLE, *(f"{ENSEMBLE}_{name}" for name in ("mean_minus_std", "minimum", "mean"))]),
            flush=True,
        )


if __name__ == "__main__":
    main()
