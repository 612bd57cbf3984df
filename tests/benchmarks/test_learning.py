"""What the part ``learning`` makes of finished runs, and what its judges learn from whatever a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.learning_figures import over_optimised
from benchmarks.learning_runs import JUDGE, JUDGES, MOST_KL, begin, samples_at
from rlhf_ray.config.loading import load_config, parse_config
from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation import best_of_n_kl


@given(st.floats(0.0, MOST_KL))
def test_samples_are_the_fewest_whose_best_costs_the_kl(kl: float) -> None:
    n = samples_at(kl)
    assert best_of_n_kl(n) >= kl and (n == 2 or best_of_n_kl(n - 1) < kl)


def test_no_best_of_n_costs_more_than_a_figure_may() -> None:
    assert samples_at(50.0) == samples_at(MOST_KL)


def test_over_optimisation_counts_from_the_peak_of_gold() -> None:
    curve = [(0.5, 1.0), (0.8, 2.0), (0.7, 2.5), (0.6, 3.0)]
    lines = [{"evaluation/gold": gold, "evaluation/reward": reward} for gold, reward in curve]
    assert over_optimised(lines) == pytest.approx((0.25, 1.0))
    assert over_optimised(lines[:2]) == (0.0, 0.0)


def test_judges_learn_the_same_whatever_their_recipe_says() -> None:
    text = "{kind: rm, run: {name: bare}, reward: {model: {}}, data: {world: {}}}"
    overrides = [*JUDGE, "reward.model.path=start"]
    bare: Any = parse_config(text, overrides)
    recipe: Any = load_config("world-rm", overrides)
    for part in ("batch", "data", "loss", "epochs", "evaluation", "normalization"):
        assert getattr(recipe, part) == getattr(bare, part), f"JUDGE has to say what {part} is"
    for part in ("model", "engine"):
        assert getattr(recipe.reward, part) == getattr(bare.reward, part), f"JUDGE has to say what reward.{part} is"


def test_the_judges_differ_in_nothing_but_their_raters() -> None:
    configs: dict[str, Any] = {name: load_config("world-rm", judge) for name, judge in JUDGES.items()}
    raters = {name: config.data.world.raters for name, config in configs.items()}
    assert raters == {"rm": "careless", "flattered_rm": "flattered"}
    assert [part for part in JUDGES["flattered_rm"] if part not in JUDGES["rm"]] == ["data.world.raters=flattered"]


def test_a_job_that_was_stopped_begins_again_and_one_that_has_finished_or_is_no_job_stays(tmp_path: Path) -> None:
    config = "{kind: rm, run: {name: bare}, reward: {model: {}}, data: {world: {}}}"
    job = tmp_path / "job"
    begin(job, config).release()
    (job / "metrics.jsonl").write_text('{"step": 1}\n')
    begin(job, config).release()
    assert not (job / "metrics.jsonl").exists()
    (job / "summary.json").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for directory in (job, other):
        with pytest.raises(RequestError):
            begin(directory, config)
    assert (job / "summary.json").is_file() and (other / "thesis.txt").is_file()
