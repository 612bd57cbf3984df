"""PPO and GRPO against best-of-n at their own KL, on seeds that the recipes ``world-ppo`` and ``world-grpo`` were not tuned on.

    python -m benchmarks.equal_kl_seeds --root DIR [--seeds 4 5 6] [--only NAME ...] [--keep]

Every seed has a world, a start and a reward model of its own. ``demo-ppo`` is the recipe of the demo, with the rewards of the
other two. Each job and each verdict is kept below ``DIR``, so that the command can be stopped and repeated at any time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ensembles import run_job
from benchmarks.equal_kl import World
from benchmarks.figures import REFERENCE, Figure, Figures, record, table
from benchmarks.learning_runs import LEARNED, Piece, run_piece
from rlhf_ray import environment
from rlhf_ray.storage import write_file

SEEDS = (4, 5, 6)
POLICIES = ("world-ppo", "world-grpo", "demo-ppo")
PROMPTS, POOL = 2000, 80
QUICK_PROMPTS, QUICK_POOL = 40, 24
QUICK = [
    "steps=2", "batch.prompts_per_step=4", "batch.samples_per_prompt=4", "batch.sequences_per_update=8",
    "evaluation.prompts=8", "algorithm.critic_warmup_steps=0",
]  # fmt: skip


def overrides(home: Path, policy: str, quick: bool) -> list[str]:
    """What the job of a policy changes in its recipe: where its models lie, and that transformers samples."""
    roles = {"policy": "sft", "reference": "sft", "reward": "rm"} | ({} if "grpo" in policy else {"critic": "rm"})
    paths = [f"{role}.model.path={home}/{model}/final" for role, model in roles.items()]
    rewards = LEARNED if policy == "demo-ppo" else []
    return [*paths, *rewards, "rollout.backend=transformers", "evaluation.best_of=0", *(QUICK if quick else [])]


def run_seed(root: Path, seed: int, policies: Sequence[str], quick: bool = False) -> None:
    """Train and judge the policies of a seed that are not there yet."""
    home = root / f"seed-{seed}"
    for name in ("sft", "rm"):
        run_piece(root, Piece(seed, name), quick=quick)
    for policy in policies:
        run_job(home, seed, policy, policy, overrides(home, policy, quick))
    left = [policy for policy in policies if not verdict(home, policy).is_file()]
    if not left:
        return
    prompts, pool = (QUICK_PROMPTS, QUICK_POOL) if quick else (PROMPTS, POOL)
    world = World(home / "sft" / "final", home / "rm" / "final", seed, prompts, pool, home / f"start-{pool}.npz")
    for policy in left:
        found = asdict(world.judge(home / policy / "final"))
        write_file(verdict(home, policy), json.dumps(found) + "\n")


def verdict(home: Path, policy: str) -> Path:
    """The file that says how a policy was judged."""
    return home / f"{policy}-at-equal-kl.json"


def figures(root: Path, seeds: Sequence[int]) -> Figures:
    """The figures of every policy that was judged on all seeds."""
    found: Figures = {}
    for policy in POLICIES:
        files = [verdict(root / f"seed-{seed}", policy) for seed in seeds]
        if all(file.is_file() for file in files):
            found |= _of_policy(policy, [json.loads(file.read_text()) for file in files])
    return found


def _of_policy(policy: str, verdicts: Sequence[Mapping[str, Any]]) -> Figures:
    label = f"{policy}, transformers as sampler, {PROMPTS} held-out prompts of the generated world, 8 answers each"
    ratio = f"{label}: gold win rate over SFT, over that of best-of-n at the same KL"
    share = {
        "win_rate": (f"{label}: gold win rate over 16 answers of SFT", [one["win_rate"] for one in verdicts]),
        "best_of_n": (f"{label}: gold win rate of best-of-n of SFT at its KL", [one["best_of_n"] for one in verdicts]),
        "ratio": (ratio, [one["ratio"] for one in verdicts]),
        "ratio_low": (f"{ratio}, 2.5 % quantile over prompts", [one["interval"][0] for one in verdicts]),
        "ratio_high": (f"{ratio}, 97.5 % quantile over prompts", [one["interval"][1] for one in verdicts]),
    }
    kept = {
        f"equal_kl.{policy}.{name}": Figure.worst(values, "share", method) for name, (method, values) in share.items()
    }
    kept[f"equal_kl.{policy}.kl"] = Figure.worst(
        [one["kl"] for one in verdicts], "nats", f"{label}: KL from SFT (k1, an answer)", higher_is_better=False
    )
    mean = sum(one["ratio"] for one in verdicts) / len(verdicts)
    kept[f"equal_kl.{policy}.mean_ratio"] = Figure(mean, "share", True, f"{ratio}, mean of {len(verdicts)} seeds")
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the figures, and keep them where asked to."""
    parser = argparse.ArgumentParser(prog="benchmarks.equal_kl_seeds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="where runs and verdicts are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", nargs="+", choices=POLICIES, default=POLICIES, help="policies")
    parser.add_argument("--quick", action="store_true", help="only show that it runs: the numbers mean nothing")
    parser.add_argument("--keep", action="store_true", help="write the figures into results/reference.json")
    options = parser.parse_args(arguments)
    if options.quick and options.keep:
        parser.error("--keep: the numbers of --quick mean nothing; leave one of the two out")
    environment.prepare()
    for seed in options.seeds:
        run_seed(options.root, seed, options.only, options.quick)
    measured = figures(options.root, options.seeds)
    print(table(measured))
    if options.keep:
        record(measured, REFERENCE)


if __name__ == "__main__":
    main()
