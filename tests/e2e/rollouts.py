"""Rollouts in vLLM on the whole real stack, in the long form: ``python -m tests.e2e.rollouts [NAME ...]`` (some 8 minutes).

- Mixtures of experts of three shapes, tied and untied, in fp32: trainer and engine agree to 1e-4 nats before and after each of
  ten updates; one of them with routing replay.
- Two deterministic runs with 256 prompts of 120 tokens a step end with the same bits.
- Two ranks with ZeRO-3 and two engines, of which one is killed and restarted, agree likewise over ten updates: with all
  weights, with LoRA merged, with changes alone of a part of a layer that vLLM fuses, and with LoRA as an adapter.

The short forms are ``tests/rollout/test_vllm_repairs.py`` and ``tests/rollout/test_vllm_budget.py``. Exit code 1 if one fails.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.world import language
from tests.architectures.configs import small_model
from tests.e2e.conftest import DEADLINE_S, command, kill_an_engine, metrics, run

CONFIG = Path(__file__).with_name("ppo_tiny.yaml")
UPDATES, TOLERANCE = 10, 1e-4
PROMPTS, TOKENS = 256, 120
SMALL = (
    "policy.ranks=1", "policy.engine.zero=0", "critic=null", "reference=null", "algorithm.name=grpo", "rollout.engines=1",
    "batch.samples_per_prompt=4", "batch.prompts_per_step=8", "evaluation.prompts=4",
)  # fmt: skip


GRPO = (
    "critic=null", "reference=null", "algorithm.name=grpo", "algorithm.kl.measure=false", "batch.samples_per_prompt=4",
    "batch.prompts_per_step=8", "evaluation.prompts=4", f"steps={UPDATES}",
)  # fmt: skip


def save_mixture(model_type: str, directory: Path, *, tied: bool = False) -> None:
    """Write a small random mixture of experts that reads the words of the generated world."""
    tokenizer = make_tokenizer("world")
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model, _ = small_model(model_type, policy=True, tie_word_embeddings=tied, bos_token_id=None, **ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def mixture(model_type: str, directory: Path, *, tied: bool, replay: bool = False) -> str:
    """The largest difference over a run of eleven steps, of which ten are sampled by updated weights."""
    save_mixture(model_type, directory / "model", tied=tied)
    policy = f"policy.model={{path: {directory / 'model'}, dtype: fp32}}"
    run(
        "train", "ppo", CONFIG, f"run.root={directory}", policy, f"steps={UPDATES + 1}", *SMALL,
        f"rollout.routing_replay={str(replay).lower()}",
    )  # fmt: skip
    steps = metrics(directory / "tiny")
    assert [step["weights/version"] for step in steps] == list(range(1, UPDATES + 2))
    before, after = (load_file(directory / part / "model.safetensors") for part in ("model", "tiny/final"))
    experts = [name for name in before if "experts" in name]
    assert experts and not all(torch.equal(before[name], after[name]) for name in experts), "experts have trained"
    worst = max(step["rollout/log_prob_difference"] for step in steps)
    assert worst <= TOLERANCE, f"trainer and rollout differ by {worst:.1e} nats"
    return f"differs by {worst:.1e} nats at most over {len(steps)} versions"


def twice(directory: Path) -> str:
    """Two deterministic runs whose steps hold many times the tokens that vLLM takes at once."""
    words, draw = [word for word in language.vocabulary() if word.isalpha()], random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(words, k=TOKENS))} for _ in range(2 * PROMPTS + 8)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = []
    for name in ("one", "other"):
        run(
            "train", "ppo", CONFIG, f"run.root={directory}", f"run.name={name}", *SMALL, "batch.samples_per_prompt=1",
            f"batch.prompts_per_step={PROMPTS}", f"batch.sequences_per_update={PROMPTS}", "algorithm.name=reinforce++",
            f"data={{path: {directory / 'prompts.jsonl'}, max_prompt_tokens: 160}}", "rollout.max_model_tokens=192",
            "batch.max_tokens_per_micro_batch=4096", "steps=2",
        )  # fmt: skip
        ends.append(load_file(directory / name / "final" / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    first, second = ([step["reward/learned"] for step in metrics(directory / name)] for name in ("one", "other"))
    assert first == second
    tokens = sum(len(make_tokenizer("world")(row["prompt"])["input_ids"]) for row in rows) / len(rows)
    assert tokens >= TOKENS
    return f"the same bits after two steps of {PROMPTS} prompts of {tokens:.0f} tokens"


def killed_once(directory: Path, settings: Sequence[object] = (), most_sent: float | None = None) -> str:
    """A run with two ranks of the policy, ZeRO-3 and two engines, one of which is killed after the second step.

    Both work at the end. ``most_sent`` bounds the share of all weights that is sent to an engine which has the last version.
    """
    parent = subprocess.Popen(command("train", "ppo", CONFIG, f"run.root={directory}", *GRPO, *settings))
    kill_an_engine(parent, directory, after_step=2)
    assert parent.wait(timeout=DEADLINE_S) == 0, "the run ended with an error"
    steps = metrics(directory / "tiny")
    assert [step["weights/version"] for step in steps] == list(range(1, UPDATES + 1))
    assert (steps[-1]["rollout/restarts"], steps[-1]["rollout/engines_healthy"]) == (1.0, 2.0), "it was not restarted"
    worst = max(step["rollout/log_prob_difference"] for step in steps)
    assert worst <= TOLERANCE, f"trainer and rollout differ by {worst:.1e} nats"
    sent = ""
    if most_sent is not None:
        shares = [step["weights/sent_share"] for step in steps]
        assert all(0.0 < share < most_sent for share in shares), f"shares of all weights that were sent: {shares}"
        sent = f"; at most {max(shares):.1%} of all weights were sent"
    return f"differs by {worst:.1e} nats at most over {len(steps)} versions{sent}"


ONE_PROJECTION, EVERY_LAYER = "policy.model.lora={rank: 4, targets: [q_proj]}", "policy.model.lora={rank: 4}"
KILLED: dict[str, Callable[[Path], str]] = {
    "whole": killed_once,
    "merged": partial(killed_once, settings=[EVERY_LAYER]),
    "changes": partial(killed_once, settings=[ONE_PROJECTION, "rollout.weight_delta=true"], most_sent=0.2),
    "adapter": partial(killed_once, settings=[EVERY_LAYER, "rollout.lora=adapter"], most_sent=0.2),
}


CASES: dict[str, Callable[[Path], str]] = (
    {
        f"{model_type}{'-tied' if tied else ''}": lambda directory, kind=model_type, tied=tied: mixture(
            kind, directory, tied=tied
        )
        for model_type, tied in [
            ("mixtral", False),
            ("qwen3_moe", False),
            ("olmoe", False),
            ("mixtral", True),
            ("qwen3_moe", True),
        ]
    }
    | {
        "mixtral-replayed": lambda directory: mixture("mixtral", directory, tied=False, replay=True),
        "deterministic": twice,
    }
    | KILLED
)


def main(names: Sequence[str]) -> int:
    """Run the cases; say of each what was measured."""
    failed = 0
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as directory:
            try:
                print(f"{name}: {CASES[name](Path(directory))}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{name}: FAILED: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
