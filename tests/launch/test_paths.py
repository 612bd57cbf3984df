"""Paths from where the user stands; names stay names."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.config.paths import run_directory, with_absolute_paths


def absolute(directory: Path, *overrides: str, recipe: str = "demo-ppo"):
    return with_absolute_paths(load_config(recipe, overrides), directory)


def test_relative_paths_are_read_from_the_directory(tmp_path):
    (tmp_path / "rows").mkdir()
    config = absolute(
        tmp_path, "run.root=out", "data.world=null", "data.path=rows/prompts.jsonl", "policy.model.path=runs/a/final"
    )
    assert run_directory(config) == tmp_path / "out" / config.run.name
    assert config.data.path == str(tmp_path / "rows/prompts.jsonl")
    assert config.policy.model.path == str(tmp_path / "runs/a/final")


def test_paths_of_sources_and_paths_that_never_are_names(tmp_path):
    sources = "{a: {path: a.jsonl}, b: {path: Org/set}, c: {path: /b.jsonl}}"
    data = absolute(tmp_path, f"data={{sources: {sources}, cache: rows/kept, max_prompt_tokens: 64}}").data
    assert [source.path for source in data.sources.values()] == [str(tmp_path / "a.jsonl"), "Org/set", "/b.jsonl"]
    assert data.cache == str(tmp_path / "rows/kept"), "a folder inside a folder, not a data set of a hub"
    assert absolute(tmp_path).data.cache == str(Path.home() / ".cache/rlhf_ray")


def test_hub_ids_and_absolute_paths_stay(tmp_path):
    config = absolute(tmp_path, "policy.model.path=Qwen/Qwen3-0.6B", "critic.model.path=/models/critic")
    assert config.policy.model.path == "Qwen/Qwen3-0.6B"
    assert config.critic.model.path == "/models/critic"


def test_a_directory_that_reads_like_a_hub_id_is_a_path_where_its_folder_stands(tmp_path):
    (tmp_path / "runs").mkdir()
    assert absolute(tmp_path, "policy.model.path=runs/sft").policy.model.path == str(tmp_path / "runs/sft")


def test_a_tokenizer_of_the_world_and_a_function_of_a_package_stay(tmp_path):
    assert absolute(tmp_path, recipe="demo-sft").policy.model.make.tokenizer_from == "world"
    own = "reward.function=my.rewards:score", "reward.model=null"
    assert absolute(tmp_path, *own).reward.function == "my.rewards:score"
    own = "reward.function=my_rewards.py:score", "reward.model=null"
    assert absolute(tmp_path, *own).reward.function == str(tmp_path / "my_rewards.py:score")


def test_nothing_else_changes(tmp_path):
    config = load_config("demo-sft", [f"run.root={tmp_path}", f"data.cache={tmp_path}/cache"])
    assert with_absolute_paths(config, Path("/elsewhere")) == config


def test_what_comes_out_is_a_config_that_loads(tmp_path):
    config = absolute(tmp_path, recipe="demo-sft")
    assert parse_config(dump_config(config)) == config


def test_a_function_in_a_file_is_a_path_under_whichever_key_it_stands(tmp_path):
    own = ["reward={function: rewards.py:score}", "evaluation.gold=truth/gold.py:score"]
    config = absolute(tmp_path, *own)
    assert config.reward.function == f"{tmp_path / 'rewards.py'}:score"
    assert config.evaluation.gold == f"{tmp_path / 'truth/gold.py'}:score"
    assert absolute(tmp_path, "reward={function: gsm8k}").reward.function == "gsm8k"
    assert absolute(tmp_path, "reward={function: 'package.module:score'}").reward.function == "package.module:score"
