"""Reward training against TRL: the same pairs in the same order from the same weights.

Both read one plain Hugging Face directory. TRL right-pads a batch and reads a score at the last token that is not padding;
this project packs sequences into micro-batches under a token budget, accumulates and steps DeepSpeed's engine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.trained_reward import TrainedRewardSetup, TrainedRewardWorker
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.models import save_pretrained
from rlhf_ray.trainers.guards import Guards
from rlhf_ray.trainers.supervised.loop import run_update, schedule_update

PAD, EOS = 0, 1
"""No sequence holds PAD, by which TRL finds its end. Some hold EOS before their end, and some do not end with it."""
SIZES: dict[str, int] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
STEPS, PAIRS_PER_STEP, HELD_OUT = 10, 6, 6
OPTIMIZER = {"learning_rate": 0.002, "betas": [0.9, 0.95], "eps": 1e-4, "weight_decay": 0.0}
"""AdamW divides a gradient by its own size: with a smaller eps, parameters whose gradients are next to nothing would make
large steps out of the last digits of fp32."""
CASES = {
    "clipped": {"max_grad_norm": 0.5, "margins": False, "centering": 0.0},
    "margins and centering": {"max_grad_norm": 1000.0, "margins": True, "centering": 0.05},
}
"""Norms of the gradients are above the bound in every step of the one, and far below it in the other."""

Pair = dict[str, Any]
Sizes = Mapping[str, int]


def make_inputs(seed: int = 20) -> dict[str, Any]:
    """Everything that decides the result, the weights themselves included."""
    draw = random.Random(seed)
    return {
        "seed": seed,
        "sizes": SIZES,
        "optimizer": OPTIMIZER,
        "cases": CASES,
        "steps": [[_pair(draw) for _ in range(PAIRS_PER_STEP)] for _ in range(STEPS)],
        "held_out": [_pair(draw) for _ in range(HELD_OUT)],
        "weights": weights_of(SIZES, seed),
    }


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """What the oracle reads: a model directory and a JSON file with the rest."""
    _write_model(inputs, directory / "model")
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
    _write_model(inputs, directory / "model")
    group = _group(inputs, case, directory / "model", zero)
    loss = RewardLoss(centering=case["centering"])
    values: dict[str, Any] = {"loss": [], "gradient norm": [], "accuracy": [], "margin": []}
    for pairs in inputs["steps"]:
        batch = make_pair_batch(_examples(pairs, margins=case["margins"]))
        schedule = schedule_update(batch, ranks=1, max_tokens=max_tokens, unit=2)
        report, applied, _ = run_update(group, group.share(batch), schedule, loss, Guards(GuardsConfig()))
        values["loss"].append(report.loss)
        values["gradient norm"].append(applied.grad_norm)
        for metric in ("accuracy", "margin"):
            total, count = report.metrics[metric]
            values[metric].append(total / count)
    held_out = make_pair_batch(_examples(inputs["held_out"], margins=False))
    schedule = schedule_update(held_out, ranks=1, max_tokens=max_tokens, unit=2)
    values["held-out scores"] = group.scores(group.share(held_out), schedule).result().numpy()
    group.save_pretrained(str(directory / "trained")).result()
    for name, weight in load_file(directory / "trained/model.safetensors").items():
        values[f"weights/{name}"] = weight
    return values


def _group(inputs: Mapping[str, Any], case: Mapping[str, Any], model: Path, zero: int) -> RewardGroup:
    """One rank in this process, as the reward group of a run has them."""
    optimizer = OptimizerConfig(**inputs["optimizer"], max_grad_norm=case["max_grad_norm"], schedule="constant")
    role = RoleConfig(
        model=ModelConfig(path=str(model), dtype="fp32"), engine=EngineConfig(zero=zero, optimizer=optimizer)
    )
    group = RewardGroup(InProcessRanks("reward", TrainedRewardWorker()))
    group.setup(TrainedRewardSetup(role, seed=0, total_updates=len(inputs["steps"])), timeout_s=60.0).result()
    return group


def _examples(pairs: Sequence[Pair], *, margins: bool) -> list[PairExample]:
    return [PairExample(pair["chosen"], pair["rejected"], pair["margin"] if margins else None) for pair in pairs]


def _pair(draw: random.Random) -> Pair:
    prompt = _tokens(draw, 2, 6) + [EOS] * draw.randrange(2)
    chosen, rejected = (prompt + _tokens(draw, 1, 10) + [EOS] * (draw.random() < 0.8) for _ in range(2))
    return {"chosen": chosen, "rejected": rejected, "margin": round(draw.uniform(0.0, 1.5), 2)}


def _tokens(draw: random.Random, fewest: int, most: int) -> list[int]:
    return [draw.randrange(EOS + 1, SIZES["vocab_size"]) for _ in range(draw.randint(fewest, most))]


def weights_of(sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    """The weights that a reward model begins with."""
    return draw_weights(_model(sizes), seed)


def draw_weights(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Weights so wide that every part of the model matters, and so narrow that it does not multiply rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(weight.shape, generator=generator) * 0.15 + (weight.dim() == 1)).numpy()
        for name, weight in model.state_dict().items()
    }


def _model(sizes: Sizes) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, tie_word_embeddings=False))


def _write_model(inputs: Mapping[str, Any], directory: Path) -> None:
    write_model(_model(inputs["sizes"]), inputs, directory)


def write_model(model: Any, inputs: Mapping[str, Any], directory: Path) -> None:
    """A plain Hugging Face directory in fp32, with a tokenizer whose words are the numbers of the tokens."""
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in inputs["weights"].items()})
    special = {PAD: "<pad>", EOS: "<eos>"}
    words = {special.get(number, str(number)): number for number in range(inputs["sizes"]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=special[PAD])),
        pad_token=special[PAD],
        eos_token=special[EOS],
    )
    save_pretrained(model, tokenizer, directory)
