"""The runs of the part ``learning``: their recipes, and how each piece of the work is run and found again.

Invariant: all algorithms of a seed start from the same policy and learn from the same reward model, which are made here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_ray.runs.directory import RunDirectory

SEEDS = (0, 1, 2)

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
"""A reward model. Everything its scores depend on is set here: no policy can learn more than its judge knows."""
JUDGES = {"rm": JUDGE, "flattered_rm": [*JUDGE, "data.world.raters=flattered"]}
LEARNED = ["reward.normalize=true", "algorithm.shaping.missing_eos={rule: replace, value: -1.0}"]
"""The rewards of a policy: normalised scores, and -1 for an answer that was cut off, since the reward model never saw one
(Huang et al. 2024)."""
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
    "monitoring.samples_per_log=128",
]  # fmt: skip
"""PPO without the KL term, for 60 steps, against a reward model that learned from raters whom flattery wins over. All
answers of a step are kept."""
EQUAL_KL = [*POLICY, *LEARNED, "algorithm.name=ppo", "steps=1", "batch.prompts_per_step=64", "rollout.timeout_s=3600"]
"""For best-of-n: only the evaluation before the first step counts, with n samples of each held-out prompt."""
BEST_OF_N = {"best_of_n": EQUAL_KL, "best_of_n_by_score": [*EQUAL_KL, "algorithm.shaping.missing_eos=null"]}
"""Picking by the rewards that PPO trains on, and by the scores of the reward model alone."""
MOST_KL = 6.0
"""Upper bound, in nats, of the KL at which best-of-n is compared: n grows with its exponential."""
SUMS = [
    *POLICY, *GROUPS, "algorithm.name=grpo", "algorithm.kl.coefficient=0.04", "reward={function: world.arithmetic}",
    "batch.samples_per_prompt=16", "batch.sequences_per_update=256", "steps=120", "rollout.max_new_tokens=8",
    "policy.engine.optimizer={learning_rate: 1.0e-3, schedule: cosine, final_fraction: 0.1}",
    "evaluation.prompts=57", "evaluation.samples_per_prompt=6", "evaluation.pass_at=[1]",
]  # fmt: skip
"""GRPO on sums, evaluated on six samples of each of the 57 held-out questions.

The KL term is needed: a policy that is sure of a wrong sum gives the same answer in every sample of a group, so that the
group has no signal, and only the pull of the reference changes it.
"""
QUICK_SFT = ["data.world.demonstrations=64", "policy.model.make.shape=llama-tiny"]
QUICK_RM = ["data.world.pairs=32", "data.world.evaluation_pairs=16"]
QUICK = [
    "steps=2", "batch.prompts_per_step=4", "batch.samples_per_prompt=4", "batch.sequences_per_update=8",
    "evaluation.prompts=8", "evaluation.best_of=4", "evaluation.every_steps=1", "evaluation.samples_shown=0",
]  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One job of one seed; the jobs of a seed run in order."""

    seed: int
    name: str


def pieces(seeds: Iterable[int] = SEEDS) -> list[Piece]:
    """All jobs, seed by seed."""
    names = ["sft", "rm", *RECIPES, *BEST_OF_N, "flattered_rm", "without_kl", "sums_sft", "sums"]
    return [Piece(seed, name) for seed in seeds for name in names]


def run_piece(root: Path, piece: Piece, *, quick: bool = False) -> None:
    """Run one job in its own directory below ``root``; does nothing where it has finished before."""
    from rlhf_ray.actors.this_process import ThisProcess
    from rlhf_ray.config.loading import dump_config, load_config
    from rlhf_ray.launch.driver import run_trainer

    directory = piece_directory(root, piece)
    if finished(directory):
        return
    recipe, overrides = _job(directory.parent, piece, quick)
    config = load_config(recipe, overrides, files=True).to_train()
    run = begin(directory, dump_config(config))
    run_trainer(config, run, None, place=ThisProcess(config.cluster))
    run.release()


def begin(directory: Path, config: str) -> RunDirectory:
    """Begin a job in its directory, from the start: what an attempt has left there that did not finish is removed."""
    from rlhf_ray.runs.directory import RunDirectory

    if (directory / "config.yaml").is_file() and not finished(directory):
        shutil.rmtree(directory)
    return RunDirectory.create(directory, config)


def piece_directory(root: Path, piece: Piece) -> Path:
    """Where a piece runs."""
    return root / f"seed-{piece.seed}" / directory_name(piece.name)


def directory_name(piece: str) -> str:
    """The name of a piece without characters that are awkward in paths."""
    return piece.replace("+", "p")


def finished(directory: Path) -> bool:
    """Whether a piece has run to its end."""
    return (directory / "summary.json").exists()


def _job(home: Path, piece: Piece, quick: bool) -> tuple[str, list[str]]:
    """The recipe of a piece and its overrides."""
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
    others = {**BEST_OF_N, "without_kl": WITHOUT_KL, "sums": [*SUMS, *sums]}
    chosen = [*{**RECIPES, **others}[piece.name], *(QUICK if quick else [])]
    if piece.name in BEST_OF_N:
        chosen += [f"evaluation.best_of={samples_at(evaluations(home / 'ppo')[-1]['evaluation/kl'])}"]
    judges = [role for role in ("critic", "reward") if not any(part.startswith(f"{role}=") for part in chosen)]
    roles = [f"{role}.model.path={home}/{start}/final" for role in ("policy", "reference")]
    judge = "flattered_rm" if piece.name == "without_kl" else "rm"
    roles += [f"{role}.model.path={home}/{judge}/final" for role in judges]
    return "demo-ppo", [*common, *roles, *chosen]


def evaluations(directory: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics that hold figures on held-out rows."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("evaluation/") for name in line)]


def samples_at(kl: float) -> int:
    """The smallest n whose best sample costs at least ``kl`` nats, or :data:`MOST_KL` where that is less."""
    from rlhf_ray.evaluation import best_of_n_kl

    n = 2
    while best_of_n_kl(n) < min(kl, MOST_KL):
        n += 1
    return n
