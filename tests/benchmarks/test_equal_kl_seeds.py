"""Recipes are judged at equal KL as they are shipped; a figure is the worst seed; the whole can be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.equal_kl import OPPONENTS, World
from benchmarks.equal_kl_seeds import POLICIES, figures, main, overrides, verdict
from benchmarks.figures import REFERENCE, read
from rlhf_ray.config.loading import load_config


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_that_a_policy_learns_from_is_changed_in_its_recipe(policy: str, tmp_path: Path) -> None:
    shipped: Any = load_config(policy).to_train()
    judged: Any = load_config(policy, overrides(tmp_path, policy, quick=False)).to_train()
    for one in (shipped, judged):
        assert (one.steps, one.batch.prompts_per_step) == (shipped.steps, shipped.batch.prompts_per_step)
        assert one.policy.engine == shipped.policy.engine and one.algorithm.kl == shipped.algorithm.kl
        assert one.reward.normalize or one is shipped
        assert one.algorithm.shaping.missing_eos is not None or one is shipped
    if policy != "demo-ppo":
        assert judged.algorithm == shipped.algorithm and judged.reward.normalize == shipped.reward.normalize


def test_a_figure_is_the_worst_seed_and_the_ratio_has_its_mean(tmp_path: Path) -> None:
    ratios = {3: 1.01, 4: 0.98, 5: 1.04}
    for seed, ratio in ratios.items():
        (tmp_path / f"seed-{seed}").mkdir()
        found = {
            "win_rate": 0.9, "kl": float(seed), "n": 20.0, "best_of_n": 0.9 / ratio, "ratio": ratio,
            "interval": [ratio - 0.01, ratio + 0.01],
        }  # fmt: skip
        verdict(tmp_path / f"seed-{seed}", "world-ppo").write_text(json.dumps(found))
    kept = figures(tmp_path, [3, 4, 5])
    assert kept["equal_kl.world-ppo.ratio"].value == 0.98 and kept["equal_kl.world-ppo.ratio"].seeds == (
        1.01,
        0.98,
        1.04,
    )
    assert kept["equal_kl.world-ppo.mean_ratio"].value == pytest.approx(1.01)
    assert kept["equal_kl.world-ppo.kl"].value == 5.0
    assert not any("grpo" in name for name in kept), "it was judged on no seed"


@pytest.mark.long
def test_the_whole_runs_and_does_nothing_twice(tmp_path: Path) -> None:
    arguments = ["--root", str(tmp_path), "--seeds", "7", "--quick"]
    main(arguments)
    home = tmp_path / "seed-7"
    found = {policy: json.loads(verdict(home, policy).read_text()) for policy in POLICIES}
    assert all(
        0 < one["win_rate"] < 1 and one["interval"][0] < one["ratio"] < one["interval"][1] for one in found.values()
    )
    changed = {file: file.stat().st_mtime_ns for file in home.rglob("*") if file.is_file()}
    main(arguments)
    assert changed == {file: file.stat().st_mtime_ns for file in home.rglob("*") if file.is_file()}

    world = World(home / "sft" / "final", home / "rm" / "final", 7, 40, 24, home / "start-24.npz")
    assert world.opponents.shape == (40, OPPONENTS)
    best, worst = world.wins(np.full(40, 2.0)), world.wins(np.full(40, -1.0))
    assert (best == 1).all() and (worst == 0).all() and ((world.pool_wins >= 0) & (world.pool_wins <= 1)).all()
    assert world.pool_wins.mean() == pytest.approx(0.5, abs=0.1), "the pool and the opponents are answers of one model"
    with pytest.raises(SystemExit, match="holds 40 prompts and a pool of 24, not 40 and 32"):
        World(home / "sft" / "final", home / "rm" / "final", 7, 40, 32, home / "start-24.npz")


def test_the_committed_figures_say_that_policies_win_as_often_as_best_of_n() -> None:
    kept = read(REFERENCE)
    for policy, mean, each in (("world-ppo", 1.0, 0.97), ("world-grpo", 0.98, 0.95)):
        assert kept[f"equal_kl.{policy}.mean_ratio"].value >= mean
        assert len(kept[f"equal_kl.{policy}.ratio"].seeds) == 3 and kept[f"equal_kl.{policy}.ratio"].value >= each
        assert kept[f"equal_kl.{policy}.ratio"].value > kept["equal_kl.demo-ppo.ratio"].value
