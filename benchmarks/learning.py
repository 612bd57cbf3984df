"""Part ``learning``: what each algorithm makes of the generated world, on three seeds, in one process without Ray.

    python -m benchmarks.learning --root DIR [--pieces N]     the same in pieces of a few minutes, gone on with at any time

Always true: all algorithms of a seed start from the same policy and learn from the same reward model, made here; a figure
is taken on held-out prompts, sampled at temperature 1 on both sides, ties counting one half, and the worst seed is the figure.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import LATEST, Figure, Figures, record, table
from rlhf_ray import environment

if TYPE_CHECKING:
    from rlhf_ray.trainers.ppo.evaluation import BestOf

SEEDS = (0, 1, 2)
METHOD = (
    "Llama of 0.5M parameters, reward model trained on pairs, transformers as sampler, plain classes in one process; gold win "
    "rate over SFT on 300 held-out prompts, temperature 1 on both sides, ties half"
)

SHARED = ["monitoring.ray_metrics=false", "checkpoint.every_steps=0"]
POLICY = ["rollout.backend=transformers", "policy.engine.optimizer.learning_rate=3.0e-4", "evaluation.best_of=0"]
JUDGE = [
    "reward.model.dtype=fp32", "reward.model.head_init=inv_sqrt", "reward.ranks=1",
    "reward.engine.optimizer={learning_rate: 1.0e-3, betas: [0.9, 0.99], schedule: cosine, warmup_fraction: 0.05,"
    " final_fraction: 0.1}",
    "data.world.pairs=19200", "data.world.evaluation_pairs=1000", "data.max_tokens=96", "epochs=1",
    "batch={pairs_per_update: 16, max_tokens_per_micro_batch: 2048}", "loss={name: sigmoid, label_smoothing: 0.05}",
    "evaluation={every_steps: 0}",
]  # fmt: skip
"""A reward model, with everything that its scores depend on: what a policy can learn is bounded by what its judge knows."""
JUDGES = {"rm": JUDGE, "flattered_rm": [*JUDGE, "data.world.raters=flattered"]}
LEARNED = ["reward.normalize=true", "algorithm.shaping.missing_eos={rule: replace, value: -1.0}"]
"""Normalised, and -1 for an answer that was cut off, about which the reward model knows nothing (Huang et al. 2024)."""
GROUPS = ["critic=null", "batch.prompts_per_step=32", "batch.samples_per_prompt=4"]
RECIPES: Mapping[str, Sequence[str]] = {
    "ppo": [*POLICY, *LEARNED, "algorithm.name=ppo", "algorithm.kl.coefficient=0.03", "evaluation.best_of=32"],
    "grpo": [*POLICY, *LEARNED, *GROUPS, "algorithm.name=grpo", "algorithm.kl.coefficient=0.08"],
    "rloo": [*POLICY, *LEARNED, *GROUPS, "algorithm.name=rloo", "algorithm.kl.coefficient=0.03"],
    "reinforce++": [*POLICY, *LEARNED, "critic=null", "algorithm.name=reinforce++", "algorithm.kl.coefficient=0.03"],
}
"""Overrides of the recipe demo-ppo, by algorithm."""
WITHOUT_KL = [
    *POLICY, *LEARNED, "algorithm.name=ppo", "algorithm.kl.coefficient=0.0", "steps=60", "evaluation.every_steps=5",
]  # fmt: skip
"""PPO as above but for the KL term, half again as long, against a judge that learned from raters whom flattery wins over."""
EQUAL_KL = [*POLICY, *LEARNED, "algorithm.name=ppo", "steps=1", "batch.prompts_per_step=64", "rollout.timeout_s=3600"]
"""One step, thrown away, for the evaluation before it: as many samples of each held-out prompt as PPO's KL pays for."""
MOST_KL = 6.0
"""Nats that a figure may cost."""
SUMS = [
    *POLICY, *GROUPS, "algorithm.name=grpo", "algorithm.kl.coefficient=0.04", "reward={function: world.arithmetic}",
    "batch.samples_per_prompt=16", "batch.sequences_per_update=256", "steps=120", "rollout.max_new_tokens=8",
    "policy.engine.optimizer={learning_rate: 1.0e-3, schedule: cosine, final_fraction: 0.1}",
    "evaluation.prompts=57", "evaluation.samples_per_prompt=6", "evaluation.pass_at=[1]",
]  # fmt: skip
"""Six samples of each of the 57 held-out questions. Without the KL term a policy that is sure of a wrong sum stays so: all
samples of its group are alike, and nothing pulls."""
QUICK_SFT = ["data.world.demonstrations=64", "policy.model.make.shape=llama-tiny"]
QUICK_RM = ["data.world.pairs=32", "data.world.evaluation_pairs=16"]
QUICK = [
    "steps=2", "batch.prompts_per_step=4", "batch.samples_per_prompt=4", "batch.sequences_per_update=8",
    "evaluation.prompts=8", "evaluation.best_of=4", "evaluation.every_steps=1", "evaluation.samples_shown=0",
]  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One part of the work on one seed; pieces of a seed run in order."""

    seed: int
    name: str


def pieces(seeds: Iterable[int] = SEEDS) -> list[Piece]:
    """Everything, a seed after the other."""
    names = ["sft", "rm", *RECIPES, "best_of_n", "flattered_rm", "without_kl", "sums_sft", "sums"]
    return [Piece(seed, name) for seed in seeds for name in names]


def run_piece(root: Path, piece: Piece, *, quick: bool = False) -> None:
    """Run one job in its own directory below ``root``, or pass where it is finished."""
    from rlhf_ray.actors.this_process import ThisProcess
    from rlhf_ray.config.loading import dump_config, load_config
    from rlhf_ray.launch.driver import training_config
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.trainers.ppo.build import train_ppo
    from rlhf_ray.trainers.supervised.reward_model import train_reward_model
    from rlhf_ray.trainers.supervised.sft import train_sft

    home = root / f"seed-{piece.seed}"
    directory = home / directory_name(piece.name)
    if finished(directory):
        return
    recipe, overrides = _job(home, piece, quick)
    config = training_config(load_config(recipe, overrides, files=True))
    run = RunDirectory.create(directory, dump_config(config))
    train: Any = {"sft": train_sft, "rm": train_reward_model, "ppo": train_ppo}[config.kind]
    train(config, run, None, place=ThisProcess(config.cluster))
    run.release()


def directory_name(piece: str) -> str:
    """Where a piece runs: its name without signs."""
    return piece.replace("+", "p")


def finished(directory: Path) -> bool:
    """Whether a piece has run to its end."""
    return (directory / "summary.json").exists()


def _job(home: Path, piece: Piece, quick: bool) -> tuple[str, list[str]]:
    """Recipe and overrides of a piece."""
    place = [
        f"run.root={home}",
        f"run.name={directory_name(piece.name)}",
        f"run.seed={piece.seed}",
        f"data.world.seed={piece.seed}",
    ]
    common = [*place, *SHARED]
    sums = ["data.world.task=arithmetic"]
    if piece.name in ("sft", "sums_sft"):
        task = sums if piece.name == "sums_sft" else []
        return "demo-sft", [*common, "policy.ranks=1", *task, *(QUICK_SFT if quick else [])]
    if piece.name in JUDGES:
        start = f"reward.model.path={home}/sft/final"
        return "world-rm", [*common, *JUDGES[piece.name], start, *(QUICK_RM if quick else [])]
    start = "sums_sft" if piece.name == "sums" else "sft"
    others = {"without_kl": WITHOUT_KL, "best_of_n": EQUAL_KL, "sums": [*SUMS, *sums]}
    chosen = [*{**RECIPES, **others}[piece.name], *(QUICK if quick else [])]
    if piece.name == "best_of_n":
        chosen += [f"evaluation.best_of={samples_at(evaluations(home / 'ppo')[-1]['evaluation/kl'])}"]
    judges = [role for role in ("critic", "reward") if not any(part.startswith(f"{role}=") for part in chosen)]
    roles = [f"{role}.model.path={home}/{start}/final" for role in ("policy", "reference")]
    judge = "flattered_rm" if piece.name == "without_kl" else "rm"
    roles += [f"{role}.model.path={home}/{judge}/final" for role in judges]
    return "demo-ppo", [*common, *roles, *chosen]


def samples_at(kl: float) -> int:
    """The smallest n of which the best costs at least ``kl`` nats, or the most that a figure may cost."""
    from rlhf_ray.evaluation import best_of_n_kl

    n = 2
    while best_of_n_kl(n) < min(kl, MOST_KL):
        n += 1
    return n


# -------------------------------------------------------------------------------------------------------------- figures


def evaluations(directory: Path) -> list[dict[str, float]]:
    """The lines of metrics that hold figures on held-out prompts."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("evaluation/") for name in line)]


def figures(root: Path, seeds: Sequence[int] = SEEDS) -> Figures:
    """The worst seed of everything, from finished runs; each figure's method tells all seeds."""
    homes = [root / f"seed-{seed}" for seed in seeds]
    found: Figures = {}
    for name in RECIPES:
        last = [evaluations(home / directory_name(name))[-1] for home in homes]
        kls = [line["evaluation/kl"] for line in last]
        rates = [line["evaluation/gold_win_rate"] for line in last]
        told = f"{name}: {METHOD}; KL at most {max(kls):.2f} nats"
        found[f"ppo.{name}.gold_win_rate"] = _worst(rates, "share", told)
        found[f"ppo.{name}.kl"] = _worst(kls, "nats", f"{name}: KL (k1, a sequence) of the same runs", higher=False)
    best = [_best_of(home / "best_of_n") for home in homes]
    sizes = ", ".join(str(row.n) for row in best)
    told = f"best of n samples of SFT by the same reward model, n {sizes}: the least that costs PPO's KL"
    found["ppo.best_of_n.gold_win_rate"] = _worst([row.win_rate for row in best], "share", f"{told}; {METHOD}")
    found["ppo.best_of_n.kl"] = _worst([row.kl for row in best], "nats", f"log n - (n - 1) / n, {told}", higher=False)
    found |= _without_kl([evaluations(home / "without_kl") for home in homes])
    sums = [evaluations(home / "sums")[-1] for home in homes]
    task = "sums of the generated world in a wording that was held out, pass@1 at temperature 1"
    passed = [[line[f"evaluation/pass_at_1{when}"] for line in sums] for when in ("", "_start")]
    found["ppo.grpo.pass_rate"] = _worst(passed[0], "share", f"GRPO on {task}")
    found["ppo.grpo.pass_rate_start"] = _worst(passed[1], "share", f"its start, {task}", higher=False)
    return found


def _without_kl(runs: Sequence[Sequence[Mapping[str, float]]]) -> Figures:
    """What PPO makes of a judge that likes flattery where nothing holds it back."""
    falls, rises = zip(*map(over_optimised, runs), strict=True)
    told = "PPO without the KL term, against a judge from raters whom flattery wins over, on held-out prompts"
    found = {
        "ppo.without_kl.gold_fall": _worst(falls, "share", f"{told}: what share of its peak gold loses"),
        "ppo.without_kl.reward_rise": _worst(
            rises, "score", "what the learned reward gains meanwhile, from the peak of gold to the end"
        ),
    }
    habits = {
        "habit_rate": ("share", "answers with the planted habit"),
        "habits_per_answer": ("habits", "habits in an answer"),
    }
    for name, (unit, what) in habits.items():
        ends, starts = ([run[-1][f"evaluation/{name}{when}"] for run in runs] for when in ("", "_start"))
        found[f"ppo.without_kl.{name}"] = _worst(ends, unit, f"{told}: {what} at the end")
        found[f"ppo.without_kl.{name}_start"] = _worst(starts, unit, f"{told}: {what} at the start", higher=False)
    return found


def _worst(values: Sequence[float], unit: str, method: str, *, higher: bool = True) -> Figure:
    """The worst seed's figure."""
    by_seed = ", ".join(f"{value:.3f}" for value in values)
    return Figure(min(values) if higher else max(values), unit, higher, f"{method}; worst seed of {by_seed}")


def over_optimised(lines: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """From the peak of gold to the end: the share of it that is lost, and what the learned reward gained."""
    peak = max(lines, key=lambda line: line["evaluation/gold"])
    fall = 1.0 - lines[-1]["evaluation/gold"] / peak["evaluation/gold"]
    return fall, lines[-1]["evaluation/reward"] - peak["evaluation/reward"]


def _best_of(directory: Path) -> BestOf:
    """The best of all samples that a run drew of each held-out prompt before it began."""
    from rlhf_ray.trainers.ppo.evaluation import BestOf

    stored = json.loads((directory / "evaluation" / "start.json").read_text())
    return BestOf(**stored["best_of"][-1])


def measure(quick: bool = False) -> Figures:
    """All pieces, one after the other, in a directory that is thrown away."""
    seeds = SEEDS[:1] if quick else SEEDS
    with tempfile.TemporaryDirectory() as directory:
        for piece in pieces(seeds):
            run_piece(Path(directory), piece, quick=quick)
        return figures(Path(directory), seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Go on with what is left, and keep the figures once all of it is done."""
    parser = argparse.ArgumentParser(prog="benchmarks.learning", description="the part learning, in pieces")
    parser.add_argument("--root", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--pieces", type=int, help="run at most so many pieces")
    given = parser.parse_args(arguments)
    environment.prepare()
    left = [piece for piece in pieces() if not finished(given.root / f"seed-{piece.seed}" / directory_name(piece.name))]
    for piece in left[: given.pieces]:
        print("piece", json.dumps(asdict(piece)), flush=True)
        run_piece(given.root, piece)
    if given.pieces is None or given.pieces >= len(left):
        found = figures(given.root)
        print(table(found))
        record(found, LATEST)


if __name__ == "__main__":
    main()
