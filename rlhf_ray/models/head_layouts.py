"""The heads that lie on disk: recognised by the names and shapes of their tensors, then read, or refused by their kind.

Invariants: a head that is read computes what the model that wrote it computes. A head of another kind is refused with its
tensors, their shapes and the way out. Nobody is advised to draw a fresh head while tensors of a trained one are there.

``docs/models.md`` says which reward models write which layout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel

from rlhf_ray.config.files import score_heads
from rlhf_ray.config.files.score_heads import (
    KNOWN_NAMES,
    OUTPUT_LAYERS,
    SCORED_TOKEN,
    FoundHead,
    layers_of,
    multi_objective,
    named_architecture,
)
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.heads import Head, MlpHead, ScoreHead
from rlhf_ray.models.weights.adapters import HEADS, PREFIX, adapts_head, read_adapter
from rlhf_ray.models.weights.adapters import WEIGHTS as ADAPTER_WEIGHTS
from rlhf_ray.models.weights.checkpoint import HEAD_FILE, HEAD_NAME, IN_LAYERS, Checkpoint, names_in

OUTPUT_TENSORS = {f"{layer}.{part}" for layer in OUTPUT_LAYERS for part in ("weight", "bias")}
"""Tensors of a causal language model that a reward model or critic does not need."""
PICKLED_HEADS = ("value_head.bin",)


def find_head(checkpoint: Checkpoint, prefix: str) -> FoundHead | None:
    """Return the head called ``prefix``, or else the first with a known name; None if the checkpoint has no such head."""
    return score_heads.find_head(checkpoint.names, checkpoint.raw_config(), prefix)


def read_head(checkpoint: Checkpoint, found: FoundHead, hidden: int) -> tuple[Head, float]:
    """Read a head and its bias (0 if it has none, or in its layers); ``hidden`` is the width of the hidden states."""
    shapes = {f"{path}.weight": checkpoint.shape(f"{path}.weight") for path in found.layers}
    _raise(score_heads.wrong_shape(found, shapes, _config_beside(checkpoint), str(checkpoint.directory)))
    if len(found.layers) > 1:
        return _read_mlp(checkpoint, found, hidden), 0.0
    (path,) = found.layers
    weight, bias = checkpoint.read(f"{path}.weight"), f"{path}.bias"
    biases = checkpoint.read(bias).flatten() if bias in checkpoint.names else None
    if biases is not None and len(biases) != len(weight):
        raise ModelLoadError(
            f"{checkpoint.directory}: {bias} holds {len(biases)} numbers, but {path}.weight has {len(weight)} rows: copy the "
            "model again"
        )
    if found.name in OUTPUT_LAYERS:
        weight, biases = weight[[SCORED_TOKEN]], biases if biases is None else biases[[SCORED_TOKEN]]
    _raise(score_heads.wrong_features(tuple(weight.shape), f"{path}.weight", str(checkpoint.directory), hidden))
    return make_linear_head(weight), 0.0 if biases is None else float(biases[0])


def make_linear_head(weight: Tensor) -> ScoreHead:
    """Make a head of a weight of shape (1, hidden)."""
    head = ScoreHead(weight.shape[1])
    head.weight.data.copy_(weight)
    return head


def _read_mlp(checkpoint: Checkpoint, found: FoundHead, hidden: int) -> MlpHead:
    names = [f"{path}.weight" for path in found.layers]
    weights = [checkpoint.read(name) for name in names]
    _raise(score_heads.wrong_features(tuple(weights[0].shape), names[0], str(checkpoint.directory), hidden))
    biases = [f"{path}.bias" for path in found.layers]
    head = MlpHead(tuple(weight.shape[1] for weight in weights), tuple(bias in checkpoint.names for bias in biases))
    numbers = [path.rpartition(".")[2] for path in found.layers]
    tensors = {f"{number}.weight": weight for number, weight in zip(numbers, weights, strict=True)}
    tensors |= {
        f"{number}.bias": checkpoint.read(bias)
        for number, bias in zip(numbers, biases, strict=True)
        if bias in checkpoint.names
    }
    head.load_state_dict(tensors)
    return head


def head_tensors(checkpoint: Checkpoint, prefix: str) -> set[str]:
    """Return the names of all tensors of the checkpoint that belong to a head."""
    stems = tuple(f"{name}." for name in (prefix, *KNOWN_NAMES))
    return {name for name in checkpoint.names if name.startswith(stems)} | (OUTPUT_TENSORS & set(checkpoint.names))


# ------------------------------------------------------------------------------------------------ heads beside an adapter


def find_adapter_head(directory: Path) -> tuple[Checkpoint, FoundHead] | None:
    """Return the head that lies beside an adapter, in its file or in LLaMA-Factory's, and what to read it from."""
    if not (directory / ADAPTER_WEIGHTS).is_file():
        read_adapter(directory)  # says what is there instead
    files = {name: file for file in (ADAPTER_WEIGHTS, HEAD_FILE) for name in names_in(directory, file)}
    beside = Checkpoint(directory, files)
    for name in (*KNOWN_NAMES, *(f"{PREFIX}{name}" for name in HEADS)):
        layers = layers_of(beside.names, name)
        if layers:
            return beside, FoundHead(name.removeprefix(PREFIX), layers)
    return None


# ------------------------------------------------------------------------------------------------------------ what is refused


def require_head(checkpoint: Checkpoint, prefix: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint without a head that can be read, before anything is loaded."""
    _raise(score_heads.refusal(_shapes(checkpoint), checkpoint.raw_config(), prefix, str(checkpoint.directory)))
    if find_head(checkpoint, prefix) is not None:
        return
    where = checkpoint.adapter or checkpoint.directory
    if any((folder / name).is_file() for folder in {where, checkpoint.directory} for name in PICKLED_HEADS):
        raise ModelLoadError(
            f"{where} holds its head as pickle ({', '.join(PICKLED_HEADS)}), which can run code when opened and is never read: "
            f"save it as {HEAD_FILE}"
        )
    if checkpoint.adapter is not None and adapts_head(checkpoint.adapter):
        raise ModelLoadError(
            f"{where} has LoRA on its head (target_modules), but neither it nor {checkpoint.directory} holds the head itself, "
            "which was drawn when the training began: merge them where the head still is, or train with modules_to_save "
            f"[{HEAD_NAME}]"
        )
    outside = outside_backbone(checkpoint, trust_remote_code=trust_remote_code)
    if outside:
        raise ModelLoadError(
            f"{where} has no head called {prefix}, but tensors outside of its backbone: "
            f"{score_heads.shown(_shapes(checkpoint), outside)}. "
            f"If they are its head, say so with value_head_prefix ({_stem(outside)})"
        )
    raise ModelLoadError(
        f"{where} has no score head ({prefix}.weight), so it is not a reward model or critic. Ask for a fresh head "
        "(init_value_head=True; in a config, head_init) or choose another checkpoint. If the logit of token "
        f"{SCORED_TOKEN} is its score, set value_head_prefix to {OUTPUT_LAYERS[0]}"
    )


def holds_scoring_model(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether a checkpoint holds a reward model or critic, be it one that is refused."""
    adapter = checkpoint.adapter
    beside = adapter is not None and (find_adapter_head(adapter) is not None or adapts_head(adapter))
    refused = bool(multi_objective(checkpoint.names)) or "ProcessReward" in named_architecture(checkpoint.raw_config())
    return beside or refused or find_head(checkpoint, prefix) is not None


def outside_backbone(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> list[str]:
    """Return the tensors of a checkpoint that belong neither to its backbone nor to a language model's output layer."""
    config = checkpoint.config(trust_remote_code=trust_remote_code)
    kind: Any = MODEL_MAPPING.get(type(config), None)
    start = f"{kind.base_model_prefix}." if kind is not None and kind.base_model_prefix else "model."
    others = [name for name in checkpoint.names if not name.startswith(start) and not IN_LAYERS.search(f".{name}")]
    if (
        kind is not None
        and len(others) < len(checkpoint.names)
        and not any(n.startswith(start) for n in checkpoint.names)
    ):
        with init_empty_weights():  # a bare backbone, whose tensors have no prefix
            own = AutoModel.from_config(config).state_dict().keys()
        others = [name for name in others if name not in own]
    return sorted(set(others) - OUTPUT_TENSORS)


def _raise(problem: str | None) -> None:
    if problem is not None:
        raise ModelLoadError(problem)


def _shapes(checkpoint: Checkpoint) -> dict[str, score_heads.Shape]:
    """The shapes of all tensors that are not within the layers of the backbone."""
    objectives = multi_objective(checkpoint.names)
    return {
        name: checkpoint.shape(name)
        for name in checkpoint.names
        if name in objectives or not IN_LAYERS.search(f".{name}")
    }


def _config_beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.json; empty beside an adapter that has none."""
    return checkpoint.raw_config() if (checkpoint.directory / "config.json").is_file() else {}


def _stem(names: list[str]) -> str:
    """How ``value_head_prefix`` would name the head that these tensors belong to."""
    trained = [name for name in names if ".original_module." not in name]  # PEFT's copy of it before the training
    weights = [name for name in trained if name.endswith(".weight")] or names
    return re.sub(r"\.\d+$", "", weights[-1].rpartition(".")[0] or weights[-1])
