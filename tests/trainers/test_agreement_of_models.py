"""The self-check lets sound models pass in bf16, and none that samples from another distribution than is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_ray.config.loading import load_config
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.monitoring.report.summary import Check
from rlhf_ray.trainers.ppo.self_check import SelfCheck
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack
from tests.models.conftest import random_model, shake_adapters

TEMPERATURE, PROMPT, LENGTH, ANSWERS = 0.9, 4, 120, 24
SCALING = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is about as sure of its tokens as a language model: random ones know nothing."""
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(2.5)
    path = tmp_path_factory.mktemp("policy")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def answers(policy: Path) -> Tensor:
    """(answers, tokens) that the policy samples in bf16, each after a prompt of its own."""
    torch.manual_seed(0)
    prompts = torch.randint(3, 48, (ANSWERS, PROMPT))
    options: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": LENGTH}
    return engine(policy).generate(prompts, min_new_tokens=LENGTH, pad_token_id=0, suppress_tokens=[0], **options)


def engine(path: Path, **changes: Any) -> PreTrainedModel:
    """The model as transformers runs it by itself, in bf16."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **changes).eval()


@torch.no_grad()
def sampled(model: PreTrainedModel, answers: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """(tokens,) log-probs of every token but the first of each sequence, whose place holds 0."""
    logits = model(answers).logits.float() / temperature
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, answers[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(answers), 1), chosen], 1).flatten()


def check(trainer: Actor, rollout: Tensor, answers: Tensor) -> Check:
    """What the self-check says of these log-probs beside those of the trainer, which packs ten sequences at a time."""
    mask = [[False] * PROMPT + [True] * (answers.shape[1] - PROMPT)] * len(answers)
    batch = TrajectoryBatch.from_sequences(answers.tolist(), action_mask=mask)
    with torch.no_grad():
        parts = [
            PackedPolicy(trainer)(pack(batch, list(range(start, min(start + 10, len(batch))))), TEMPERATURE).log_probs
            for start in range(0, len(batch), 10)
        ]
    batch = batch.with_columns(log_probs=torch.cat(parts), rollout_log_probs=rollout)
    config = load_config("demo-ppo", ["policy.model.dtype=bf16", "rollout.dtype=bf16"])
    return SelfCheck(config, None, None).same_log_probs(batch)  # type: ignore[arg-type]


def trainer(path: Path, **options: Any) -> Actor:
    return Actor(str(path), param_dtype="bf16", **options).eval()


def test_the_policy_is_as_sure_as_a_language_model(policy: Path, answers: Tensor) -> None:
    entropy = -float(sampled(engine(policy), answers).view(ANSWERS, -1)[:, PROMPT:].mean())
    assert 0.7 < entropy < 2.5, "nats a token"


def test_the_same_weights_pass(policy: Path, answers: Tensor) -> None:
    found = check(trainer(policy), sampled(engine(policy), answers), answers)
    assert found.passed and "over 2880 tokens" in found.value, found
    largest = float(found.value.partition("largest ")[2].split()[0])
    assert largest > 1e-3, "two ways of computing in bf16, not one"


def test_another_temperature_does_not_pass(policy: Path, answers: Tensor) -> None:
    assert not check(trainer(policy), sampled(engine(policy), answers, temperature=1.0), answers).passed


def test_log_probs_of_the_token_before_do_not_pass(policy: Path, answers: Tensor) -> None:
    assert not check(trainer(policy), sampled(engine(policy), answers).roll(1), answers).passed


def test_positions_that_are_scaled_otherwise_do_not_pass(policy: Path, answers: Tensor) -> None:
    assert not check(trainer(policy), sampled(engine(policy, rope_parameters=SCALING), answers), answers).passed


def test_weights_of_the_version_before_do_not_pass(policy: Path, answers: Tensor) -> None:
    """After one large update; one that moves log-probs by less than rounding does is not seen, nor does it matter."""
    newer = trainer(policy)
    loss = engine(policy)
    before = {name: weight.clone() for name, weight in loss.named_parameters()}
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.01)
    loss(answers[:8], labels=answers[:8]).loss.backward()
    optimizer.step()
    newer.model.load_state_dict(loss.state_dict(), strict=False)
    stale = engine(policy)
    assert all(torch.equal(weight, before[name]) for name, weight in stale.named_parameters())
    assert check(newer, sampled(loss.eval(), answers), answers).passed, "the version that is trained"
    assert not check(newer, sampled(stale, answers), answers).passed


def test_an_engine_that_dropped_the_adapter_does_not_pass(policy: Path, answers: Tensor) -> None:
    adapted = trainer(policy, lora_rank=4, target_modules=["q_proj", "v_proj"])
    assert check(adapted, sampled(engine(policy), answers), answers).passed, "an adapter begins at zero"
    shake_adapters(adapted)
    assert not check(adapted, sampled(engine(policy), answers), answers).passed
