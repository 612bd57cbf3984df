"""Supervised fine-tuning against TRL: the same sequences in the same order from the same weights, with the same tokens learned.

TRL right-pads a batch; this project packs sequences into micro-batches under a token budget, accumulates and steps DeepSpeed's
engine. Sequences are ragged, and some have several answers, as conversations have.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.losses import NegativeLogLikelihood
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import DemonstrationExample, make_demonstration_batch
from rlhf_ray.trainers.guards import Guards
from rlhf_ray.trainers.supervised.loop import run_update, schedule_update

from .trl_reward import EOS, OPTIMIZER, SIZES, Sizes, draw_weights, write_model

STEPS, SEQUENCES_PER_STEP = 10, 6
CASES = {"clipped": {"max_grad_norm": 0.5}, "free": {"max_grad_norm": 1000.0}}
"""Norms of the gradients are above the bound in every step of the one, and far below it in the other."""


def make_inputs(seed: int = 26) -> dict[str, Any]:
    """Everything that decides the result, the weights themselves included."""
    draw = random.Random(seed)
    return {
        "seed": seed,
        "sizes": SIZES,
        "optimizer": OPTIMIZER,
        "cases": CASES,
        "steps": [[_sequence(draw) for _ in range(SEQUENCES_PER_STEP)] for _ in range(STEPS)],
        "weights": draw_weights(_model(SIZES), seed),
    }


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """What the oracle reads: a model directory and a JSON file with the rest."""
    write_model(_model(inputs["sizes"]), inputs, directory / "model")
    rest = {name: value for name, value in inputs.items() if name != "weights"}
    (directory / "inputs.json").write_text(json.dumps(rest))


def ours(inputs: Mapping[str, Any], *, max_tokens: int = 64, zero: int = 0) -> dict[str, np.ndarray]:
    """What this project computes in every case."""
    values: dict[str, np.ndarray] = {}
    for name, case in inputs["cases"].items():
        with TemporaryDirectory() as directory:
            found = _train(inputs, case, Path(directory), max_tokens, zero)
        values |= {f"{name}/{key}": np.asarray(value, dtype=np.float32) for key, value in found.items()}
    return values


def _train(
    inputs: Mapping[str, Any], case: Mapping[str, Any], directory: Path, max_tokens: int, zero: int
) -> dict[str, Any]:
    write_model(_model(inputs["sizes"]), inputs, directory / "model")
    optimizer = OptimizerConfig(**inputs["optimizer"], max_grad_norm=case["max_grad_norm"], schedule="constant")
    role = RoleConfig(
        model=ModelConfig(path=str(directory / "model"), dtype="fp32"),
        engine=EngineConfig(zero=zero, optimizer=optimizer),
    )
    group = PolicyGroup(InProcessRanks("policy", PolicyWorker()))
    group.setup(LanguageSetup(role, seed=0, total_updates=len(inputs["steps"])), timeout_s=60.0).result()
    values: dict[str, Any] = {"loss": [], "gradient norm": []}
    for sequences in inputs["steps"]:
        batch = make_demonstration_batch(
            [DemonstrationExample(each["ids"], list(map(bool, each["learned"]))) for each in sequences]
        )
        schedule = schedule_update(batch, ranks=1, max_tokens=max_tokens)
        report, applied, _ = run_update(
            group, group.share(batch), schedule, NegativeLogLikelihood(), Guards(GuardsConfig())
        )
        values["loss"].append(report.loss)
        values["gradient norm"].append(applied.grad_norm)
    group.save_pretrained(str(directory / "trained")).result()
    for name, weight in load_file(directory / "trained/model.safetensors").items():
        values[f"weights/{name}"] = weight
    return values


def _sequence(draw: random.Random) -> dict[str, list[int]]:
    """Ids, and 1 for each that is learned: one answer or two, each with an end, after prompts."""
    ids: list[int] = []
    learned: list[int] = []
    for _ in range(draw.randint(1, 2)):
        prompt, answer = (
            [draw.randrange(EOS + 1, SIZES["vocab_size"]) for _ in range(draw.randint(1, 9))] for _ in "pa"
        )
        ids += [*prompt, *answer, EOS]
        learned += [0] * len(prompt) + [1] * (len(answer) + 1)
    return {"ids": ids, "learned": learned}


def _model(sizes: Sizes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
