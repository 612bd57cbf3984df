"""Everything that a config names and that lies on this machine has a fingerprint, and each of its files counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import ConfigError, IntegrityError
from rlhf_ray.runs.inputs import compare_inputs, fingerprint_inputs, frozen_models
from rlhf_ray.runs.record import Record, read_record, write_record
from rlhf_ray.storage.fingerprint import Fingerprint


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, models, an adapter of one of them, and code."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.jsonl", "two.jsonl", "held.jsonl", "demonstrations.jsonl", "own.py"):
        Path(name).write_text(name)
    for name in ("policy", "critic", "judge", "base"):
        Path(name).mkdir()
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            Path(name, file).write_text(json.dumps({"name": name}))
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    Path("adapter/adapter_model.safetensors").write_text("adapter")
    return tmp_path


def ppo() -> Any:
    section = {
        "run": {"name": "a"},
        "policy": {"model": {"path": "policy"}, "engine": {"optimizer": {"learning_rate": 1e-3}}},
        "critic": {"model": {"path": "critic", "head_init": "zero"}, "engine": {"optimizer": {"learning_rate": 1e-3}}},
        "reference": {"model": {"path": "policy"}},
        "reward": {
            "mixture": {
                "judged": {"model": {"path": "judge"}},
                "adapted": {"model": {"path": "adapter"}},
                "counted": {"function": "own.py:count"},
                "mine": {"source": "own.py:Source"},
            }
        },
        "data": {
            "sources": {"first": {"path": "one.jsonl"}, "second": {"path": "two.jsonl"}},
            "evaluation_path": "held.jsonl",
        },
        "batch": {"prompts_per_step": 4, "sequences_per_update": 4},
        "algorithm": {"objective": "own.py:Objective", "advantages": "own.py:Advantages", "collector": "own.py:Collector"},
        "evaluation": {"gold": "own.py:gold"},
        "kind": "ppo",
        "steps": 2,
    }  # fmt: skip
    Path("ppo.yaml").write_text(json.dumps(section))
    return load_config("ppo.yaml").to_train()


KEYS = {
    "data.sources.first.path": "one.jsonl",
    "data.sources.second.path": "two.jsonl",
    "data.evaluation_path": "held.jsonl",
    "policy.model.path": "policy/model.safetensors",
    "critic.model.path": "critic/config.json",
    "reference.model.path": "policy/tokenizer.json",
    "reward.mixture.judged.model.path": "judge/model.safetensors",
    "reward.mixture.adapted.model.path": "base/model.safetensors",
    "reward.mixture.counted.function": "own.py",
    "reward.mixture.mine.source": "own.py",
    "algorithm.objective": "own.py",
    "algorithm.advantages": "own.py",
    "algorithm.collector": "own.py",
    "evaluation.gold": "own.py",
}


def test_every_input_of_ppo_has_a_fingerprint_under_its_key(place):
    assert fingerprint_inputs(ppo()).keys() == KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_one_byte_of_it_is_refused_under_its_key(place, key):
    known = fingerprint_inputs(ppo())
    file = Path(KEYS[key])
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        compare_inputs(known, fingerprint_inputs(ppo()), run=place / "run")
    assert any(problem.startswith(f"{key}: what lies there has changed") for problem in refused.value.problems)
    accepted = compare_inputs(known, fingerprint_inputs(ppo()), run=place / "run", accept=known.keys())
    assert key in {one.key for one in accepted}


@pytest.mark.parametrize("base", ["policy", "adapter"])
def test_other_weights_below_an_adapter_are_refused_whatever_is_accepted(place, base):
    """Its checkpoints hold digests of them. Another tokenizer is no other weight."""
    assert frozen_models(ppo()) == set()
    config = load_config("ppo.yaml", [f"policy.model.path={base}", "policy.model.lora={rank: 2}"]).to_train()
    assert frozen_models(config) == {"policy.model.path"}
    known = fingerprint_inputs(config)
    base = "base" if base == "adapter" else base
    options = {"run": place / "run", "frozen": frozen_models(config), "accept": known.keys()}
    for name, may in (("tokenizer.json", True), ("model.safetensors", False)):
        file, before = Path(base, name), Path(base, name).read_text()
        file.write_text(before.replace("{", "{ "))
        now = fingerprint_inputs(config)
        assert now["policy.model.path"] != known["policy.model.path"]
        if may:
            assert "policy.model.path" in {one.key for one in compare_inputs(known, now, **options)}
        else:
            with pytest.raises(ConfigError) as refused:
                compare_inputs(known, now, **options)
            (problem,) = refused.value.problems
            assert problem.startswith("policy.model.path: what lies there has changed") and "--accept" not in problem
            assert "Put the earlier content back, or start a new run: other weights cannot be accepted here" in problem
        file.write_text(before)


def test_a_model_of_a_hub_that_moved_on_is_had_back_by_its_commit(place):
    known, now = (Fingerprint((("commit", digit * 40),)) for digit in "ab")
    with pytest.raises(ConfigError) as refused:
        compare_inputs({"policy.model.path": known}, {"policy.model.path": now}, run=place / "run")
    assert f"Name the earlier commit (policy.model.revision={'a' * 40}), or go on with" in str(refused.value)


def test_the_demonstrations_that_a_reward_model_is_normalised_over_are_an_input(place):
    config = load_config(
        "demo-rm",
        ["run.name=a", "reward.model.path=judge", "data.world=null", "data.path=one.jsonl", "data.evaluation_fraction=0.1",
         "normalization.over=demonstrations", "normalization.demonstrations_path=demonstrations.jsonl"],
    )  # fmt: skip
    keys = {"data.path", "reward.model.path", "normalization.demonstrations_path"}
    assert fingerprint_inputs(config.to_train()).keys() == keys


def test_what_cannot_be_read_is_said_and_hides_nothing_else(place, project_log):
    Path("one.jsonl").unlink()
    assert fingerprint_inputs(ppo()).keys() == KEYS.keys() - {"data.sources.first.path"}
    assert "data.sources.first.path has no fingerprint: " in project_log.getvalue()


def test_a_record_comes_back_as_it_was(place):
    record = Record("kind: ppo\nname: ü\n", fingerprint_inputs(ppo()))
    write_record(place / "inputs.json", record)
    assert read_record(place / "inputs.json") == record
    assert read_record(place / "none.json") is None
    text = (place / "inputs.json").read_text()
    (place / "inputs.json").write_text(text.replace(record.inputs["data.evaluation_path"].files[0][1], "0" * 64))
    with pytest.raises(IntegrityError, match="does not match its own files"):
        read_record(place / "inputs.json")
