"""Every algorithm runs through the same loop, with the groups it needs and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.actors.workers.policy import PolicyWorker
from rlhf_ray.algorithms.importance import ImportanceCorrection
from rlhf_ray.algorithms.policy_loss import Dppo
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.sections.algorithm import PRESETS
from rlhf_ray.errors import GroupError, RlhfRayError
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.algorithm import make_policy_loss, make_preparation
from rlhf_ray.trainers.ppo.build import train_ppo

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
SMALL = [
    "policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
    "monitoring.ray_metrics=false", "evaluation.prompts=2", "checkpoint.every_steps=0", "steps=2",
    "batch.prompts_per_step=4", "batch.samples_per_prompt=4", "batch.sequences_per_update=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


def run(root: Path, *overrides: str) -> tuple[RunDirectory, list[dict[str, float]]]:
    """A run of two steps and the metrics of its steps."""
    config: Any = load_config(TINY_PPO, [f"run.root={root}", *SMALL, *overrides], kind="ppo")
    directory = RunDirectory.create(Path(config.run.root) / config.run.name, dump_config(config))
    train_ppo(config, directory, None, place=ThisProcess(config.cluster))
    return directory, [line for line in directory.metrics.read() if "reward/learned" in line]


@pytest.mark.parametrize("name", PRESETS)
def test_every_algorithm_learns_with_the_groups_it_needs(tmp_path: Path, name: str) -> None:
    has_critic = name == "ppo"
    has_kl = name in ("ppo", "grpo", "rloo", "reinforce++", "reinforce++_baseline", "distill")
    changes = [f"algorithm.name={name}", "algorithm.dynamic_sampling=0", "algorithm.kl={}"]
    changes += [] if has_critic else ["critic=null"]
    changes += ["reference.model.make.seed=5"] if name == "distill" else []  # a teacher that knows something else
    directory, steps = run(tmp_path, *changes, *([] if has_kl else ["reference=null"]))
    assert [line["update"] for line in steps] == [2.0, 4.0]
    assert all(line["grad_norm/policy"] > 0 and line["updates/skipped"] == 0 for line in steps)
    for line in steps:
        assert ("kl/k1" in line) == has_kl
        assert "rollout/log_prob_difference_part_1" in line
        assert ("loss/value" in line) == ("explained_variance" in line) == has_critic
        assert ("loss/kl" in line) == (name in ("grpo", "reinforce++_baseline"))
    assert (directory.final / "critic").exists() == has_critic


def test_dynamic_sampling_learns_from_prompts_whose_answers_differ_and_accounts_for_all(tmp_path: Path) -> None:
    function = tmp_path / "rewards.py"
    function.write_text(
        "def score(prompts, responses, labels, finished):\n"
        "    alike = [len(prompt) % 2 == 0 for prompt in prompts]\n"
        "    return [1.0 if same else float(len(text)) for same, text in zip(alike, responses)]\n"
    )
    reward = "reward={function: " + f"{function}:score" + "}"
    directory, steps = run(tmp_path, reward, "algorithm.dynamic_sampling=5")
    assert all(line["groups/without_signal"] == 0.0 for line in steps)
    assert any(line["prompts/sampled"] > 4 for line in steps)
    assert all(line["prompts/dropped"] == 0.0 for line in steps)
    used = [len(entry.prompt_ids) for entry in directory.ledger.entries()]
    assert used == [int(line["prompts/sampled"]) for line in steps]


def test_every_key_of_the_importance_weights_reaches_them() -> None:
    changes = "algorithm.importance={level: sequence, rule: mask, low: 0.0, high: 0.125, gating: binary_kl}"
    config: Any = load_config(TINY_PPO, [changes], kind="ppo")
    assert make_preparation(config).importance == ImportanceCorrection("sequence", "mask", 0.0, 0.125, "binary_kl")


@pytest.mark.parametrize(("name", "kind"), [("dppo_tv", "tv"), ("dppo_kl", "binary_kl")])
def test_every_key_of_dppo_reaches_it(name: str, kind: Any) -> None:
    changes = f"algorithm={{objective: {name}, clip_low: 0.05, clip_high: 0.25, dual_clip: 4.0}}"
    config: Any = load_config(TINY_PPO, [changes], kind="ppo")
    assert make_policy_loss(config).objective == Dppo(kind, 0.05, 0.25, 4.0)


def test_an_engine_that_computes_log_probs_otherwise_than_the_policy_does_not_start(tmp_path, monkeypatch) -> None:
    honest = PolicyWorker.execution
    monkeypatch.setattr(PolicyWorker, "execution", lambda self: replace(honest(self), transformers="4.0"))
    with pytest.raises(RlhfRayError, match=r"transformers is .* in rollout engine 0 at .* and 4\.0 in the policy"):
        run(tmp_path, "algorithm.kl={}")


def test_an_engine_that_changes_after_its_start_serves_no_step(tmp_path, monkeypatch) -> None:
    honest, asked = TransformersEngine._loaded, []

    def loaded(self: TransformersEngine) -> dict[str, Any]:
        asked.append(self)
        started = len(asked) <= 2  # when it starts, and when the driver asks it
        return honest(self) if started else honest(self) | {"transformers": "4.0"}

    monkeypatch.setattr(TransformersEngine, "_loaded", loaded)
    with pytest.raises(GroupError, match=r"no engine has the weights[\s\S]*transformers is 4\.0 in the engine"):
        run(tmp_path, "algorithm.kl={}")
    assert len(asked) == 3, "at the first publication"
