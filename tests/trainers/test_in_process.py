"""The three trainers with plain classes in one process: no Ray, no vLLM, the same groups, engines and loops.

What must hold: SFT's loss and the reward model's improve; PPO raises the learned reward, takes a step only once its prompts
are in the ledger, skips a poisoned update on policy and critic alike, and resumes to the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import NumericalError, RequestError, ResumableStop
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.execution import read_execution
from rlhf_ray.trainers import stopping
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.ppo.self_check import LOG_PROBS, UPDATED_LOG_PROBS
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trainers.supervised.reward_model import train_reward_model
from rlhf_ray.trainers.supervised.sft import train_sft

pytestmark = pytest.mark.early

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
ONE_PROCESS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
               "monitoring.ray_metrics=false", "evaluation.prompts=4"]  # fmt: skip


def start(config: TrainingJob) -> RunDirectory:
    return RunDirectory.create(Path(config.run.root) / config.run.name, dump_config(config))


def lines(run: RunDirectory, name: str) -> list[float]:
    return [line[name] for line in run.metrics.read() if name in line]


def ppo_config(root: Path, *overrides: str) -> Any:
    return load_config(TINY_PPO, [f"run.root={root}", *ONE_PROCESS, *overrides], kind="ppo")


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


def test_sft_then_a_reward_model_from_its_policy(tmp_path: Path) -> None:
    shared = [f"run.root={tmp_path}", "monitoring.ray_metrics=false"]
    tiny = ["policy.model.make.shape=llama-tiny", "policy.ranks=1", "policy.engine.optimizer.learning_rate=0.01",
            "data.world.demonstrations=640"]  # fmt: skip
    sft = load_config("demo-sft", [*shared, *tiny, "epochs=1.5"], kind="sft")
    run = start(sft)
    train_sft(sft, run, None, place=ThisProcess(sft.cluster))
    losses = lines(run, "loss/sft")
    assert len(losses) == 30 and losses[-1] < 0.6 * losses[0]
    assert lines(run, "evaluation/loss")[-1] < 0.6 * losses[0]

    small = ["reward.ranks=1", "data.world.pairs=256", "data.world.evaluation_pairs=64",
             f"reward.model.path={run.final}"]  # fmt: skip
    rm = load_config("demo-rm", [*shared, *small], kind="rm", files=True)
    trained = start(rm)
    train_reward_model(rm, trained, None, place=ThisProcess(rm.cluster))
    assert len(lines(trained, "loss/rm")) == 16
    assert {"accuracy", "margin", "tie_rate", "calibration_error"} <= {
        name.removeprefix("evaluation/") for line in trained.metrics.read() for name in line
    }
    assert (trained.final / "model.safetensors").exists() and trained.report_path.exists()


def test_ppo_raises_the_learned_reward(tmp_path: Path) -> None:
    config = ppo_config(tmp_path, "steps=16", "checkpoint.every_steps=0", "batch.prompts_per_step=64",
                        "batch.sequences_per_update=32")  # fmt: skip
    run = start(config)
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    rewards, deviation = lines(run, "reward/learned"), lines(run, "reward/std")[0]
    assert sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3 > 4 * deviation / (3 * 64) ** 0.5
    assert run.ledger.last_step == 16
    assert max(lines(run, "rollout/log_prob_difference")) <= 1e-4
    assert not [*(run.path / "rollout-start").glob("*.safetensors")], "the first update brings all weights"
    checks = [check.name for check in run.summary().checks]
    assert checks.count(LOG_PROBS) == checks.count(UPDATED_LOG_PROBS) == 1, "at start, and once after an update"


def test_a_run_that_was_asked_to_stop_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ppo_config(tmp_path / "whole", "steps=4")
    undisturbed = start(whole)
    train_ppo(whole, undisturbed, None, place=ThisProcess(whole.cluster))

    config = ppo_config(tmp_path / "stopped", "steps=4")
    run = start(config)
    monkeypatch.setattr(stopping._stop, "is_set", lambda: run.ledger.last_step == 3)
    with pytest.raises(ResumableStop, match="after step 3 of 4; go on with: rlhf-ray resume"):
        train_ppo(config, run, None, place=ThisProcess(config.cluster))
    run.release()
    monkeypatch.undo()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None and checkpoint.step == 3
    refuse_another_tokenizer(config, again, checkpoint)
    train_ppo(config, again, checkpoint, place=ThisProcess(config.cluster))
    for part in (".", "critic"):
        one = load_file(undisturbed.final / part / "model.safetensors")
        other = load_file(again.final / part / "model.safetensors")
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert lines(again, "step") == [1, 2, 3, 4] + [4] * (len(lines(again, "step")) - 4)


def refuse_another_tokenizer(config: Any, run: RunDirectory, checkpoint: Any) -> None:
    """As if the run had been on another one before."""
    kept = run.execution_path.read_text()
    tokenizer = read_execution(run.execution_path)["policy"].tokenizer
    assert tokenizer is not None and kept.count(tokenizer) == 2, "policy and engine have the same"
    run.execution_path.write_text(kept.replace(tokenizer, "1f"))
    with pytest.raises(
        RequestError, match=rf"cannot go on.* tokenizer is {tokenizer} in policy now and 1f in this run before"
    ):
        train_ppo(config, run, checkpoint, place=ThisProcess(config.cluster))
    run.execution_path.write_text(kept)


def test_poisoned_updates_are_skipped_by_policy_and_critic_and_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(tmp_path, "steps=5", "run.max_consecutive_skips=2", "checkpoint.every_steps=1")
    run = start(config)
    learn = Learner.learn

    def poisoned(self: Learner, batch: Any, schedules: Any, **options: Any) -> Any:
        returns = batch["returns"].clone()
        returns[batch["action_mask"].nonzero()[0]] = float("nan")
        return learn(self, batch.with_columns(returns=returns), schedules, **options)

    monkeypatch.setattr(Learner, "learn", poisoned)
    with pytest.raises(NumericalError, match="2 updates in a row had NaN or Inf"):
        train_ppo(config, run, None, place=ThisProcess(config.cluster))
    assert lines(run, "updates/skipped") == [1.0, 1.0] and lines(run, "weights/version") == [0.0, 0.0]
    assert lines(run, "kl/k3") == [0.0, 0.0]  # only the critic's numbers were poisoned: the policy kept its weights too
