"""Distillation draws the policy to its teacher: by the policy's own answers, token by token, and on answers that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.algorithms.losses import PolicyOutputs
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.data.load import load_prompts
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import load_policy, load_tokenizer
from rlhf_ray.planning.job_memory import job_memory
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.algorithm import make_policy_loss, make_preparation
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trajectories.batch import TrajectoryBatch
from tests.trainers.small_runs import train
from tests.trainers.test_algorithms import SMALL, TINY_PPO

TEACHER = ["algorithm={name: distill}", "critic=null", "reward={function: none}", "reference.model.make.seed=5"]


def config_of(*overrides: str) -> Any:
    return load_config(TINY_PPO, [*SMALL, *TEACHER, *overrides], kind="ppo")


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


def test_the_gradient_is_that_of_the_reverse_kl_of_every_token() -> None:
    """Of all answers of two tokens, each as often as the student gives it, so that the mean over them is exact."""
    student = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]]) / 4  # of the first token and of the second
    teacher = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    logits = student.log().requires_grad_()
    answers = [
        (a, b) for a in range(3) for b in range(3) for _ in range(round(16 * float(student[0, a] * student[1, b])))
    ]
    tokens = torch.tensor(answers)
    assert len(tokens) == 16
    log_probs = logits.log_softmax(-1)[[0, 1], tokens]

    def column(of_answers: torch.Tensor) -> torch.Tensor:
        """With a prompt of one token in front of each."""
        return torch.cat([torch.zeros_like(of_answers[:, :1]), of_answers], 1).flatten()

    columns = {
        "token_ids": column(tokens), "action_mask": column(torch.ones(16, 2, dtype=torch.bool)),
        "log_probs": column(log_probs.detach()), "rollout_log_probs": column(log_probs.detach()),
        "reference_log_probs": column(teacher.log()[[0, 1], tokens]), "score": torch.zeros(16),
        "finish_reason": torch.zeros(16, dtype=torch.int8), "prompt_id": torch.arange(16),
    }  # fmt: skip
    batch = TrajectoryBatch(torch.arange(0, 49, 3), columns)
    config = config_of()
    prepared, metrics = make_preparation(config)(
        batch, kl_coefficient=config.algorithm.kl.coefficient, moments=RunningMoments()
    )
    assert prepared["advantages"].tolist() == pytest.approx(
        (batch["reference_log_probs"] - batch["log_probs"]).tolist(), abs=1e-6
    )
    loss = make_policy_loss(config)(PolicyOutputs(column(log_probs)), prepared)
    (gradient,) = torch.autograd.grad(loss.loss / 32, logits)
    again = student.log().requires_grad_()
    kl = (again.log_softmax(-1).exp() * (again.log_softmax(-1) - teacher.log())).sum()
    (expected,) = torch.autograd.grad(kl / 2, again)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    assert metrics["kl/k1"] == pytest.approx(float(kl), abs=1e-5)


@torch.no_grad()
def reverse_kl(student: Any, teacher: Any, token_ids: torch.Tensor, prompt: int) -> float:
    """The mean KL from student to teacher of the tokens behind the prompt, over the whole vocabulary, in nats."""
    one, other = (model(token_ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1) for model in (student, teacher))
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_a_student_comes_nearer_to_its_teacher_and_its_own_start_is_measured(tmp_path: Path) -> None:
    """The reward is nothing, so that nothing but the teacher can have taught it."""
    config = config_of(
        f"run.root={tmp_path}", "steps=6", "policy.engine.optimizer.learning_rate=2.0e-3",
        "batch={prompts_per_step: 32, samples_per_prompt: 1, sequences_per_update: 32, max_tokens_per_micro_batch: 512}",
    )  # fmt: skip
    directory = RunDirectory.create(Path(config.run.root) / config.run.name, dump_config(config))
    train_ppo(config, directory, None, place=ThisProcess(config.cluster))
    assert {"evaluation/kl_start", "evaluation/kl"} <= set(directory.metrics.read()[-1])
    start, teacher = (
        load_policy(model, device=torch.device("cpu")).model for model in (config.policy.model, config.reference.model)
    )
    student = AutoModelForCausalLM.from_pretrained(directory.final, dtype=torch.float32)
    prompts = load_prompts(config.data, load_tokenizer(config.policy.model), config.run.seed).held_out
    answer = torch.randint(8, 100, (8,), generator=torch.Generator().manual_seed(0))
    before, after = (
        sum(
            reverse_kl(model, teacher, torch.cat([torch.tensor(prompt.token_ids), answer]), len(prompt.token_ids))
            for prompt in prompts
        )
        for model in (start, student)
    )
    assert after < 0.8 * before


MADE = "{make: {shape: llama-tiny, tokenizer_from: world, seed: %d}, dtype: fp32%s}"
OFFLINE = [
    "data={path: rows.jsonl, evaluation_fraction: 0.2, max_tokens: 96, cache: null}", "policy.ranks=1",
    "policy.engine.optimizer.learning_rate=5.0e-3",
    "batch.sequences_per_update=8", "monitoring.ray_metrics=false",
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in the working directory."""
    monkeypatch.chdir(tmp_path)
    pairs = [
        {"prompt": f"My tent number {n} came broken.", "answer": f"We send a new tent {n % 7} today."}
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def offline(policy: str, teacher: str, *overrides: str) -> RunDirectory:
    models = [f"policy.model={policy}", f"teacher={teacher}", "run.root=runs"]
    config: Any = load_config("demo-distill", [*models, *OFFLINE, *overrides], kind="distill")
    return train(config)


@pytest.mark.parametrize("lora", ["", ", lora: {rank: 4}"], ids=["whole", "lora"])
@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.usefixtures("rows")
def test_on_answers_that_are_there_a_student_comes_nearer_too(loss: str, lora: str) -> None:
    directory = offline(MADE % (1, lora), MADE % (2, ""), f"loss.name={loss}", "epochs=2")
    lines = directory.metrics.read()
    steps = [line["divergence/teacher"] for line in lines if "divergence/teacher" in line]
    assert steps[-1] < 0.9 * steps[0]
    assert lines[-1]["evaluation/divergence"] < steps[0]


@pytest.mark.usefixtures("rows")
def test_from_a_teacher_that_it_equals_a_policy_learns_nothing() -> None:
    directory = offline(MADE % (1, ""), MADE % (1, ""))
    steps = [line for line in directory.metrics.read() if "divergence/teacher" in line]
    assert steps[0]["divergence/teacher"] < 1e-6
    assert steps[0]["grad_norm"] < 1e-4, "later ones are not nothing: AdamW makes steps of any gradient, rounding too"


@pytest.mark.usefixtures("rows")
def test_a_teacher_with_another_tokenizer_is_refused_before_anything_runs() -> None:
    teacher = "teacher={make: {shape: llama-tiny, tokenizer_from: rows.jsonl}, dtype: fp32}"
    with pytest.raises(ConfigError, match=r"teacher.model: its tokenizer .* is not the policy's"):
        load_config("demo-distill", [f"policy.model={MADE % (1, '')}", teacher, *OFFLINE], kind="distill", files=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            ["reference=null"],
            "reference: missing: algorithm distill draws the policy to the reference, which is the teacher",
        ),
        (["algorithm.kl.measure=false"], "algorithm.kl.coefficient: 1 needs a reference, but measure is false"),
        (
            ["reference.model.make.tokenizer_from=prompts.jsonl"],
            "reference.model: its tokenizer (made from prompts.jsonl, 4096 tokens) is not the policy's",
        ),
    ],
)
def test_what_makes_no_distillation_is_refused(
    changes: list[str], problem: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    with pytest.raises(ConfigError) as raised:
        load_config(TINY_PPO, [*SMALL, *TEACHER, *changes], kind="ppo", files=True)
    assert problem in str(raised.value)


def test_the_plan_counts_the_teacher_whole_whatever_the_policy_shards() -> None:
    parts = {}
    for zero in (0, 3):
        config = load_config(
            "demo-distill",
            [f"policy.model={MADE % (1, '')}", f"teacher={MADE % (2, '')}", f"policy.engine.zero={zero}"],
            kind="distill",
        )
        (policy,) = job_memory(config)
        parts[zero] = {part.what: part.bytes for part in policy.parts}
        assert parts[zero]["teacher's weights"] == parts[0]["weights"]
    assert parts[3]["weights"] < parts[0]["weights"]
