"""The heads that lie on disk: recognised by the names and shapes of their tensors, then read, or refused by their kind.

Invariants: a head that is read computes what the model that wrote it computes. A head of another kind is refused with its
tensors, their shapes and the way out. Nobody is advised to draw a fresh head while tensors of a trained one are there.

``docs/models.md`` says which reward models write which layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.heads import Head, MlpHead, ScoreHead
from rlhf_ray.models.weights.adapters import HEADS, PREFIX, read_adapter
from rlhf_ray.models.weights.adapters import WEIGHTS as ADAPTER_WEIGHTS
from rlhf_ray.models.weights.checkpoint import HEAD_FILE, HEAD_NAME, Checkpoint, names_in

KNOWN_NAMES = (
    HEAD_NAME, "value_head", "v_head.summary", "v_head", "regression_head", "reward_head", "score_head", "out_proj",
)  # fmt: skip
"""Names of a head that is read wherever it is found, the first first."""
OUTPUT_LAYERS = ("lm_head", "embed_out", "output")
"""What causal language models call their output layer. As a head it is read only where ``value_head_prefix`` names it."""
OUTPUT_TENSORS = {f"{layer}.{part}" for layer in OUTPUT_LAYERS for part in ("weight", "bias")}
"""Tensors of a causal language model that a reward model or critic does not need."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the name of an input embedding ends, to which an output layer may be tied."""
SCORED_TOKEN = 0
"""The token whose logit is the score of a model without another head (Llama-3.1-Nemotron-70B-Reward)."""
OBJECTIVES = ("regression_layer", "gating")
"""Parts of a multi-objective head (ArmoRM, QRM, LDL): one output per objective, weighted by a network that reads the prompt."""
IN_LAYERS = re.compile(r"\.(layers|blocks|layer|h)\.\d+\.")
"""What names of tensors within the layers of a model contain."""
PICKLED_HEADS = ("value_head.bin",)
WITH_ITS_CODE = "score with the code that it came with (reward.source or reward.url)"
"""What is left for a head that this project cannot compute."""
SHOWN = 4


@dataclass(frozen=True)
class FoundHead:
    """A head in a checkpoint: the name that ``value_head_prefix`` has for it, and its linear layers, first to last."""

    name: str
    layers: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What the head is made of, for the line on loading."""
        if self.name in OUTPUT_LAYERS:
            return f"the logit of token {SCORED_TOKEN} in {self.name}"
        return self.name if len(self.layers) == 1 else f"{self.name}, an MLP of {len(self.layers)} layers with ReLU"


def find_head(checkpoint: Checkpoint, prefix: str) -> FoundHead | None:
    """Return the head called ``prefix``, or else the first with a known name; None if the checkpoint has no such head."""
    if prefix in OUTPUT_LAYERS:
        layer = _output_layer(checkpoint, prefix)
        if layer:
            return FoundHead(prefix, (layer,))
    inside = re.fullmatch(r"(.+)\.\d+", prefix)
    stems = (inside[1], prefix) if inside and len(_layers(checkpoint, inside[1])) > 1 else (prefix,)
    for name in (*stems, *KNOWN_NAMES):
        layers = _layers(checkpoint, name)
        if layers:
            return FoundHead(name, layers)
    return None


def _layers(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """The linear layers of the head called ``name``: one, or numbered ones."""
    if f"{name}.weight" in checkpoint.names:
        return (name,)
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.weight")
    numbers = sorted(int(match[1]) for match in map(pattern.fullmatch, checkpoint.names) if match)
    return tuple(f"{name}.{number}" for number in numbers)


def _output_layer(checkpoint: Checkpoint, name: str) -> str | None:
    """The output layer, or the embedding that it is tied to."""
    if f"{name}.weight" in checkpoint.names:
        return name
    if not checkpoint.raw_config().get("tie_word_embeddings"):
        return None
    embeddings = (tensor for tensor in checkpoint.names if tensor.endswith(EMBEDDINGS))
    return next((tensor.removesuffix(".weight") for tensor in embeddings), None)


def read_head(checkpoint: Checkpoint, found: FoundHead, hidden: int) -> tuple[Head, float]:
    """Read a head and its bias (0 if it has none, or in its layers); ``hidden`` is the width of the hidden states."""
    if len(found.layers) > 1:
        return _read_mlp(checkpoint, found, hidden), 0.0
    (path,) = found.layers
    weight, bias = checkpoint.read(f"{path}.weight"), f"{path}.bias"
    biases = checkpoint.read(bias).flatten() if bias in checkpoint.names else None
    if found.name in OUTPUT_LAYERS:
        weight, biases = weight[[SCORED_TOKEN]], biases if biases is None else biases[[SCORED_TOKEN]]
    check_head(weight, f"{path}.weight", checkpoint.directory, hidden, _architecture(checkpoint))
    return make_linear_head(weight), 0.0 if biases is None else float(biases[0])


def make_linear_head(weight: Tensor) -> ScoreHead:
    """Make a head of a weight of shape (1, hidden)."""
    head = ScoreHead(weight.shape[1])
    head.weight.data.copy_(weight)
    return head


def _read_mlp(checkpoint: Checkpoint, found: FoundHead, hidden: int) -> MlpHead:
    weights = [checkpoint.read(f"{path}.weight") for path in found.layers]
    numbers = [int(path.rpartition(".")[2]) for path in found.layers]
    chained = all(weight.dim() == 2 for weight in weights) and all(
        after.shape[1] == before.shape[0] for before, after in pairwise(weights)
    )
    if numbers != list(range(0, 2 * len(numbers), 2)) or not chained:
        shapes = _shown(checkpoint, [f"{path}.weight" for path in found.layers])
        raise ModelLoadError(
            f"the head {found.name} of {checkpoint.directory} ({shapes}) is not made of linear layers with one activation "
            f"between each two, which are the only MLPs that are read: choose another checkpoint, or {WITH_ITS_CODE}"
        )
    first, last = f"{found.layers[0]}.weight", f"{found.layers[-1]}.weight"
    check_head(weights[-1], last, checkpoint.directory, weights[-1].shape[1], _architecture(checkpoint))
    check_head(weights[0][:1], first, checkpoint.directory, hidden)
    biases = [f"{path}.bias" for path in found.layers]
    head = MlpHead(tuple(weight.shape[1] for weight in weights), tuple(bias in checkpoint.names for bias in biases))
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
        layers = _layers(beside, name)
        if layers:
            return beside, FoundHead(name.removeprefix(PREFIX), layers)
    return None


# ------------------------------------------------------------------------------------------------------------ what is refused


def require_head(checkpoint: Checkpoint, prefix: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint without a head that can be read, before anything is loaded."""
    architecture, objectives = _architecture(checkpoint), _objectives(checkpoint)
    if "ProcessReward" in architecture:
        raise ModelLoadError(_process_reward(checkpoint.directory, architecture))
    if objectives:
        raise ModelLoadError(
            f"{checkpoint.directory} ({architecture}) has a multi-objective head: {_shown(checkpoint, objectives)}. It "
            "weighs its objectives by what a network of its own reads at the end of the prompt, which is not supported: choose "
            f"a model with one output, or {WITH_ITS_CODE}"
        )
    if find_head(checkpoint, prefix) is not None:
        return
    where = checkpoint.adapter or checkpoint.directory
    if any((folder / name).is_file() for folder in {where, checkpoint.directory} for name in PICKLED_HEADS):
        raise ModelLoadError(
            f"{where} holds its head as pickle ({', '.join(PICKLED_HEADS)}), which can run code when opened and is never read: "
            f"save it as {HEAD_FILE}"
        )
    outside = outside_backbone(checkpoint, trust_remote_code=trust_remote_code)
    if outside:
        raise ModelLoadError(
            f"{where} has no head called {prefix}, but tensors outside of its backbone: {_shown(checkpoint, outside)}. "
            f"If they are its head, say so with value_head_prefix ({_stem(outside)})"
        )
    raise ModelLoadError(
        f"{where} has no score head ({prefix}.weight), so it is not a reward model or critic. Ask for a fresh head "
        "(init_value_head=True; in a config, head_init) or choose another checkpoint. If the logit of token "
        f"{SCORED_TOKEN} is its score, set value_head_prefix to {OUTPUT_LAYERS[0]}"
    )


def scores(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether a checkpoint holds a reward model or critic, be it one that is refused."""
    beside = checkpoint.adapter is not None and find_adapter_head(checkpoint.adapter) is not None
    refused = bool(_objectives(checkpoint)) or "ProcessReward" in _architecture(checkpoint)
    return beside or refused or find_head(checkpoint, prefix) is not None


def _objectives(checkpoint: Checkpoint) -> list[str]:
    return sorted(name for name in checkpoint.names if name.split(".")[0] in OBJECTIVES)


def check_head(weight: Tensor, name: str, directory: Path, hidden: int, architecture: str = "") -> None:
    """Refuse a weight that does not map ``hidden`` features to one number."""
    if weight.dim() != 2 or weight.shape[0] != 1:
        if "TokenClassification" in architecture and weight.shape[0] == 2:
            raise ModelLoadError(_process_reward(directory, f"{architecture}, {name} {tuple(weight.shape)}"))
        raise ModelLoadError(
            f"the head {name} of {directory} has {weight.shape[0]} outputs (num_labels), shape {tuple(weight.shape)}, "
            f"but a reward model or critic needs 1: choose a checkpoint with one output, or {WITH_ITS_CODE}"
        )
    if weight.shape[1] != hidden:
        raise ModelLoadError(
            f"the head {name} of {directory} reads {weight.shape[1]} features, but the "
            f"model has {hidden}: the checkpoint mixes files of different models"
        )


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


def _process_reward(directory: Path, what: str) -> str:
    return (
        f"{directory} is a process reward model ({what}): it rates every step of an answer, with two outputs each, and not the "
        f"answer as a whole, which is not supported: choose an outcome reward model, or {WITH_ITS_CODE}"
    )


def _architecture(checkpoint: Checkpoint) -> str:
    described = checkpoint.raw_config() if (checkpoint.directory / "config.json").is_file() else {}
    return str((described.get("architectures") or ["no architecture named"])[0])


def _shown(checkpoint: Checkpoint, names: list[str]) -> str:
    some = ", ".join(f"{name} {checkpoint.shape(name)}" for name in names[:SHOWN])
    return some + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _stem(names: list[str]) -> str:
    """How ``value_head_prefix`` would name the head that these tensors belong to."""
    weights = [name for name in names if name.endswith(".weight")] or names
    return re.sub(r"\.\d+$", "", weights[-1].rpartition(".")[0] or weights[-1])
