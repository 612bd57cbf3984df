"""Reward models and critics against OpenRLHF's classes: from directories that this project writes, and as OpenRLHF writes.

Scores and values from batches padded on either side, raw and normalised; heads under ``score`` and under a name of
OpenRLHF's own; a mixture of experts, whose weights have other names in memory than on disk. What OpenRLHF writes again holds
the tensors that this project writes, under the same names.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

from rlhf_ray.models import get_llm_for_sequence_regression, save_pretrained

PAD, EOS = 0, 1
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
CASES = {
    "llama": {"kind": "llama", "head": "score"},
    "llama value_head": {"kind": "llama", "head": "value_head"},
    "mixtral value_head": {"kind": "mixtral", "head": "value_head"},
}
MEAN, STD = 0.25, 1.5
ACTIONS = 5


def make_inputs(seed: int = 22) -> dict[str, Any]:
    """Sequences of which one holds PAD and EOS inside, padded on either side with EOS; weights are drawn from the seed."""
    draw = random.Random(seed)
    sequences = [[draw.randrange(2, SIZES["vocab_size"]) for _ in range(length)] for length in (9, 6, 2, 13)]
    sequences[0][3], sequences[0][5] = EOS, PAD
    return {"seed": seed, "sizes": SIZES, "cases": CASES, "mean": MEAN, "std": STD,
            "batches": {side: _padded(sequences, side) for side in ("left", "right")}}  # fmt: skip


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """What the oracle reads: a directory a case, and a JSON file with the batches."""
    for name, case in inputs["cases"].items():
        _write(inputs, case, directory / name)
    (directory / "inputs.json").write_text(json.dumps(dict(inputs)))


@torch.no_grad()
def ours(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What this project reads out of the same directories, and which tensors it has written."""
    values: dict[str, np.ndarray] = {}
    for name, case in inputs["cases"].items():
        with TemporaryDirectory() as directory:
            _write(inputs, case, Path(directory))
            found = _values(inputs, Path(directory))
            for tensor_name, tensor in load_file(Path(directory) / "model.safetensors").items():
                found[f"written/{tensor_name}"] = tensor.sum()[None]
        values |= {f"{name}/{key}": value.numpy() for key, value in found.items()}
    return values


def _values(inputs: Mapping[str, Any], directory: Path) -> dict[str, torch.Tensor]:
    values = {}
    for side, batch in inputs["batches"].items():
        ids, mask, action_mask = (torch.tensor(batch[name]) for name in ("ids", "mask", "action_mask"))
        for normalize in (False, True):
            name = f"{side}, {'normalised' if normalize else 'raw'}"
            for kind, what, arguments in (
                ("reward", "scores", (ids, mask)),
                ("critic", "values", (ids, action_mask, mask)),
            ):
                model = get_llm_for_sequence_regression(
                    str(directory), kind, param_dtype="fp32", normalize_reward=normalize, packing_samples=side == "left"
                )
                values[f"{what}, {name}"] = model.eval()(*arguments)
    return values


def _write(inputs: Mapping[str, Any], case: Mapping[str, str], directory: Path) -> None:
    """A reward model that this project has loaded from a language model, and written."""
    with TemporaryDirectory() as base:
        _model(inputs, case["kind"]).save_pretrained(base)
        model = get_llm_for_sequence_regression(
            base, "reward", param_dtype="fp32", init_value_head=True, value_head_prefix=case["head"]
        )
    draw = random.Random(inputs["seed"])
    head = [draw.gauss(0.0, 0.5) for _ in range(inputs["sizes"]["hidden_size"])]
    model.head.weight.data = torch.tensor([head])
    metadata = {"mean": inputs["mean"], "std": inputs["std"]}
    save_pretrained(model, None, directory, metadata=metadata, head_prefix=case["head"])


def _model(inputs: Mapping[str, Any], kind: str) -> PreTrainedModel:
    """Weights from Python's own generator, in the order of their names: the same with every version of torch."""
    sizes = inputs["sizes"]
    config = LlamaConfig(**sizes) if kind == "llama" else MixtralConfig(**sizes, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = random.Random(inputs["seed"])
    for _, weight in sorted(model.named_parameters()):
        numbers = torch.tensor([draw.gauss(0.0, 0.2) for _ in range(weight.numel())])
        weight.data = numbers.view(weight.shape) + (weight.dim() == 1)
    return model


def _padded(sequences: list[list[int]], side: str) -> dict[str, list[list[int]]]:
    """Ids, attention mask, and a mask of the last actions with gaps."""
    longest = max(map(len, sequences))
    batch: dict[str, list[list[int]]] = {"ids": [], "mask": [], "action_mask": []}
    for sequence in sequences:
        padding = longest - len(sequence)
        ids, mask = [EOS] * padding, [0] * padding
        batch["ids"].append(ids + sequence if side == "left" else sequence + ids)
        batch["mask"].append(mask + [1] * len(sequence) if side == "left" else [1] * len(sequence) + mask)
        kept = [int(index % 3 > 0) for index in range(ACTIONS)]
        attended = batch["mask"][-1][-ACTIONS - 1 : -1]
        batch["action_mask"].append([keep * attend for keep, attend in zip(kept, attended, strict=True)])
    return batch
