"""DPO and its relatives against TRL: the same answers in the same order from the same weights.

TRL pads, computes the reference beside every step and, of KTO, the answers to other prompts too; this project packs sequences
into micro-batches under a token budget and asks its policy for the reference once, before the first update.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.preferences.rewards import kl_baseline
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.policy_training import PolicyLossConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import (
    JudgedExample,
    make_both_answers_batch,
    make_judged_batch,
    make_other_answers_batch,
    make_policy_pair_batch,
)
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.models import save_pretrained
from rlhf_ray.trainers.guards import Guards
from rlhf_ray.trainers.supervised.loop import run_update, schedule_update
from rlhf_ray.trainers.supervised.policy_loss import make_answer_loss, make_pair_loss
from rlhf_ray.trainers.supervised.reference import Reference, measure

PAD, EOS = 0, 1
SIZES: dict[str, int] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
STEPS, ROWS_PER_STEP = 10, 6
OPTIMIZER = {"learning_rate": 0.002, "betas": [0.9, 0.95], "eps": 1e-4, "weight_decay": 0.0}
"""With a smaller eps, parameters whose gradients are next to nothing would make large steps out of the last digits of fp32."""
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"trl": "sigmoid", "loss": {"name": "sigmoid", "beta": 0.3}},
    "ipo": {"trl": "ipo", "loss": {"name": "ipo", "beta": 0.5}},
    "sigmoid of means": {"trl": "sigmoid_norm", "loss": {"name": "sigmoid", "beta": 2.0, "length_normalised": True}},
    "simpo": {"trl": "simpo", "loss": {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.6}},
    "simpo, labels smoothed": {
        "trl": "simpo", "loss": {"name": "simpo", "beta": 1.5, "simpo_gamma": 0.3, "label_smoothing": 0.1},
    },
    "kto": {
        "trl": "kto", "loss": {"name": "kto", "beta": 0.4, "desirable_weight": 1.2, "undesirable_weight": 0.9},
    },
}  # fmt: skip
"""TRL's name of each loss, and what it is called here."""

Row = dict[str, Any]
Inputs = Mapping[str, Any]


def make_inputs(seed: int = 31) -> dict[str, Any]:
    """Everything that decides the result, the weights themselves included."""
    draw = random.Random(seed)
    return {
        "seed": seed,
        "sizes": SIZES,
        "optimizer": OPTIMIZER,
        "cases": CASES,
        "steps": [[_row(draw, number) for number in range(ROWS_PER_STEP)] for _ in range(STEPS)],
        "weights": _weights(seed),
    }


def prepare(inputs: Inputs, directory: Path) -> None:
    """What the oracle reads: a model directory and a JSON file with the rest."""
    _write_model(inputs, directory / "model")
    rest = {name: value for name, value in inputs.items() if name != "weights"}
    (directory / "inputs.json").write_text(json.dumps(rest))


def ours(inputs: Inputs, *, max_tokens: int = 64, zero: int = 0, cases: Sequence[str] | None = None) -> dict[str, Any]:
    """What this project computes in every case, or in some."""
    values: dict[str, np.ndarray] = {}
    for name, case in inputs["cases"].items():
        if cases is not None and name not in cases:
            continue
        with TemporaryDirectory() as directory:
            found = _train(inputs, PolicyLossConfig(**case["loss"]), Path(directory), max_tokens, zero)
        values |= {f"{name}/{key}": np.asarray(value, dtype=np.float32) for key, value in found.items()}
    return values


def _train(inputs: Inputs, config: PolicyLossConfig, directory: Path, max_tokens: int, zero: int) -> dict[str, Any]:
    _write_model(inputs, directory / "model")
    model = ModelConfig(path=str(directory / "model"), dtype="fp32")
    group = _group(inputs, model, zero)
    reference = Reference(group, model, max_tokens, None)
    steps = _judged(inputs) if config.name == "kto" else _pairs(inputs)
    make_both = make_both_answers_batch if config.name == "kto" else make_policy_pair_batch
    known = [
        [replace(row, reference=both) for row, both in zip(rows, reference.log_probs(rows, make_both), strict=True)]
        for rows in steps
    ]
    values: dict[str, Any] = {"loss": [], "gradient norm": [], "reward/chosen": [], "reward/rejected": []}
    for rows in known:
        if config.name == "kto":
            loss, batch, unit = make_answer_loss(config), make_judged_batch(rows), 1
            now = measure(group, make_other_answers_batch(rows), max_tokens, unit=1)
            before = torch.tensor([row.reference[1] for row in rows])
            loss = replace(loss, baseline=kl_baseline(now - before))
            values.setdefault("kl", []).append(loss.baseline)
        else:
            loss, batch, unit = make_pair_loss(config), make_policy_pair_batch(rows), 2
        schedule = schedule_update(batch, ranks=1, max_tokens=max_tokens, unit=unit)
        report, applied, _ = run_update(group, group.share(batch), schedule, loss, Guards(GuardsConfig()))
        values["loss"].append(report.loss)
        values["gradient norm"].append(applied.grad_norm)
        for metric in ("reward/chosen", "reward/rejected"):
            total, count = report.metrics[metric]
            values[metric].append(total / count)
    if config.is_normalised and config.reads_reference:  # TRL logs sums there, which it does not train on
        del values["reward/chosen"], values["reward/rejected"]
    group.save_pretrained(str(directory / "trained")).result()
    for name, weight in load_file(directory / "trained/model.safetensors").items():
        values[f"weights/{name}"] = weight
    return values


def _group(inputs: Inputs, model: ModelConfig, zero: int) -> PolicyGroup:
    """One rank in this process, as the policy group of a run has them."""
    optimizer = OptimizerConfig(**inputs["optimizer"], max_grad_norm=1000.0, schedule="constant")
    role = RoleConfig(model=model, engine=EngineConfig(zero=zero, optimizer=optimizer))
    group = PolicyGroup(InProcessRanks("policy", PolicyWorker()))
    group.setup(LanguageSetup(role, seed=0, total_updates=len(inputs["steps"])), timeout_s=60.0).result()
    return group


def _pairs(inputs: Inputs) -> list[list[PairExample]]:
    return [
        [
            PairExample(
                row["prompt"] + row["chosen"], row["prompt"] + row["rejected"], prompt_length=len(row["prompt"]),
                chosen_answer=len(row["chosen"]), rejected_answer=len(row["rejected"]),
            )
            for row in rows
        ]
        for rows in inputs["steps"]
    ]  # fmt: skip


def _judged(inputs: Inputs) -> list[list[JudgedExample]]:
    """Of each pair the side that ``label`` names; as in TRL the other answer is that of the row before in its step."""
    steps = []
    for rows in inputs["steps"]:
        answers = [row["chosen" if row["label"] else "rejected"] for row in rows]
        others = [answers[-1], *answers[:-1]]
        steps.append(
            [
                JudgedExample(row["prompt"], answer, row["label"], other)
                for row, answer, other in zip(rows, answers, others, strict=True)
            ]
        )
    return steps


def _row(draw: random.Random, number: int) -> Row:
    """Of every step the first answer is desirable and the second is not."""
    chosen, rejected = ([*_tokens(draw, 1, 10), EOS] for _ in range(2))
    label = number == 0 or (number > 1 and draw.random() < 0.5)
    return {"prompt": _tokens(draw, 2, 6), "chosen": chosen, "rejected": rejected, "label": label}


def _tokens(draw: random.Random, fewest: int, most: int) -> list[int]:
    return [draw.randrange(EOS + 1, SIZES["vocab_size"]) for _ in range(draw.randint(fewest, most))]


def _weights(seed: int) -> dict[str, np.ndarray]:
    """Weights so wide that every part of the model matters, and so narrow that it does not multiply rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(weight.shape, generator=generator) * 0.15 + (weight.dim() == 1)).numpy()
        for name, weight in _model(SIZES).state_dict().items()
    }


def _model(sizes: Mapping[str, int]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


def _write_model(inputs: Inputs, directory: Path) -> None:
    """A plain Hugging Face directory in fp32, with a tokenizer whose words are the numbers of the tokens."""
    model = _model(inputs["sizes"])
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in inputs["weights"].items()})
    special = {PAD: "<pad>", EOS: "<eos>"}
    words = {special.get(number, str(number)): number for number in range(inputs["sizes"]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=special[PAD])),
        pad_token=special[PAD],
        eos_token=special[EOS],
    )
    save_pretrained(model, tokenizer, str(directory), state=model.state_dict(), metadata={})
