"""The score heads that lie on disk: recognised by the names and shapes of their tensors, or refused by their kind.

Invariants: a head that is refused is named with its tensors, their shapes and the way out, by ``check`` and by loading in the
same words. Weights are never read, only the names and shapes at the beginning of their files; a file that cannot be read is
no problem here, since loading says what is wrong with it.

``docs/models.md`` says which reward models write which layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.encoders import encoder_type
from rlhf_ray.config.files.models import is_adapter, model_config_file
from rlhf_ray.config.files.positions import text_part
from rlhf_ray.config.problems import Problem, unless_absent
from rlhf_ray.config.sections.models import ModelConfig

Shape = tuple[int, ...]

HEAD_NAME = "score"
"""What transformers, vLLM and this project call a score head on disk."""
KNOWN_NAMES = (
    HEAD_NAME, "value_head", "v_head.summary", "v_head", "regression_head", "reward_head", "score_head", "out_proj",
)  # fmt: skip
"""Names of a head that is read wherever it is found, the first first."""
OUTPUT_LAYERS = ("lm_head", "embed_out", "output")
"""What causal language models call their output layer. As a head it is read only where ``value_head_prefix`` names it."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""How the name of an input embedding ends, to which an output layer may be tied."""
SCORED_TOKEN = 0
"""The token whose logit is the score of a model without another head (Llama-3.1-Nemotron-70B-Reward)."""
OBJECTIVES = ("regression_layer", "gating")
"""Parts of a multi-objective head (ArmoRM, QRM, LDL): one output per objective, weighted by a network that reads the prompt."""
WITH_ITS_CODE = "score with the code that it came with (reward.source or reward.url)"
"""What is left for a head that this project cannot compute."""
SHOWN = 4
LARGEST_HEADER = 1 << 27
"""Bytes of names and shapes beyond which a file is no file of weights."""


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


def find_head(names: Collection[str], config: Mapping[str, Any], prefix: str) -> FoundHead | None:
    """The head called ``prefix``, or else the first with a known name; None if no tensor of ``names`` is one.

    ``config`` is the content of config.json.
    """
    if prefix in OUTPUT_LAYERS:
        layer = _output_layer(names, config, prefix)
        if layer:
            return FoundHead(prefix, (layer,))
    inside = re.fullmatch(r"(.+)\.\d+", prefix)
    stems = (inside[1], prefix) if inside and len(layers_of(names, inside[1])) > 1 else (prefix,)
    for name in (*stems, *KNOWN_NAMES):
        layers = layers_of(names, name)
        if layers:
            return FoundHead(name, layers)
    return None


def layers_of(names: Collection[str], head: str) -> tuple[str, ...]:
    """The linear layers of a head: one, or numbered ones."""
    if f"{head}.weight" in names:
        return (head,)
    pattern = re.compile(rf"{re.escape(head)}\.(\d+)\.weight")
    numbers = sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)
    return tuple(f"{head}.{number}" for number in numbers)


def _output_layer(names: Collection[str], config: Mapping[str, Any], layer: str) -> str | None:
    """The output layer, or the embedding that it is tied to."""
    if f"{layer}.weight" in names:
        return layer
    if not config.get("tie_word_embeddings"):
        return None
    return next((name.removesuffix(".weight") for name in names if name.endswith(EMBEDDINGS)), None)


def refusal(shapes: Mapping[str, Shape], config: Mapping[str, Any], prefix: str, where: str) -> str | None:
    """Why the head of a checkpoint cannot be read; None if it can, or if there is none."""
    architecture = named_architecture(config)
    objectives = multi_objective(shapes)
    if "ProcessReward" in architecture:
        return process_reward(where, architecture)
    if objectives:
        return (
            f"{where} ({architecture}) has a multi-objective head: {shown(shapes, objectives)}. It weighs its objectives by "
            "what a network of its own reads at the end of the prompt, which is not supported: choose a model with one output, "
            f"or {WITH_ITS_CODE}"
        )
    found = find_head(shapes, config, prefix)
    return None if found is None else _more_parts(found, shapes, where) or wrong_shape(found, shapes, config, where)


def _more_parts(found: FoundHead, shapes: Mapping[str, Shape], where: str) -> str | None:
    """Why a head is only a part of the one in the checkpoint, which computes something else; None if it is whole."""
    whole = found.name.rpartition(".")[0] or found.name
    inside = [name for name in shapes if name.startswith(f"{whole}.")]
    read = {f"{layer}.{part}" for layer in found.layers for part in ("weight", "bias")}
    others = sorted(set(inside) - read)
    if not others or any(name.endswith(EMBEDDINGS) for name in inside):
        return None
    return (
        f"the head {whole} of {where} has parts besides {', '.join(found.layers)}: {shown(shapes, others)}. A head is read "
        f"where it is one linear layer, or numbered ones with ReLU between: choose another checkpoint, or {WITH_ITS_CODE}"
    )


def wrong_shape(found: FoundHead, shapes: Mapping[str, Shape], config: Mapping[str, Any], where: str) -> str | None:
    """Why the layers of a head do not make one number of a hidden state; None if they do."""
    if found.name in OUTPUT_LAYERS:
        return None
    architecture = named_architecture(config)
    tensors = [f"{layer}.weight" for layer in found.layers]
    own = [shapes[name] for name in tensors]
    if len(own) > 1 and not _is_mlp(found, own):
        return (
            f"the head {found.name} of {where} ({shown(shapes, tensors)}) is not made of linear layers with one activation "
            f"between each two, which are the only MLPs that are read: choose another checkpoint, or {WITH_ITS_CODE}"
        )
    hidden = text_part(config).get("hidden_size")
    return wrong_outputs(own[-1], tensors[-1], where, architecture) or (
        wrong_features(own[0], tensors[0], where, hidden) if isinstance(hidden, int) else None
    )


def _is_mlp(found: FoundHead, shapes: Sequence[Shape]) -> bool:
    numbers = [int(layer.rpartition(".")[2]) for layer in found.layers]
    chained = all(len(shape) == 2 for shape in shapes) and all(
        after[1] == before[0] for before, after in pairwise(shapes)
    )
    return chained and numbers == list(range(0, 2 * len(numbers), 2))


def wrong_outputs(shape: Shape, name: str, where: str, architecture: str = "") -> str | None:
    """Why a weight does not give one number; None if it does."""
    if len(shape) == 2 and shape[0] == 1:
        return None
    if len(shape) != 2:
        return (
            f"the head {name} of {where} has shape {shape}, but that of a linear layer is (1, features): choose another "
            f"checkpoint, or {WITH_ITS_CODE}"
        )
    if "TokenClassification" in architecture and shape[0] == 2:
        return process_reward(where, f"{architecture}, {name} {shape}")
    return (
        f"the head {name} of {where} has {shape[0]} outputs (num_labels), shape {shape}, but a reward model or critic needs 1: "
        f"choose a checkpoint with one output, or {WITH_ITS_CODE}"
    )


def wrong_features(shape: Shape, name: str, where: str, hidden: int) -> str | None:
    """Why a weight does not read hidden states of ``hidden`` numbers; None if it does."""
    if shape[1] == hidden:
        return None
    return (
        f"the head {name} of {where} reads {shape[1]} features, but the model has {hidden}: the checkpoint mixes files of "
        "different models"
    )


def process_reward(where: str, what: str) -> str:
    """The sentence that refuses a process reward model."""
    return (
        f"{where} is a process reward model ({what}): it rates every step of an answer, with two outputs each, and not the "
        f"answer as a whole, which is not supported: choose an outcome reward model, or {WITH_ITS_CODE}"
    )


def multi_objective(names: Collection[str]) -> list[str]:
    """The tensors of a multi-objective head, if there is one."""
    return sorted(name for name in names if name.split(".")[0] in OBJECTIVES)


def named_architecture(config: Mapping[str, Any]) -> str:
    """The class that a config.json names."""
    return str((config.get("architectures") or ["no architecture named"])[0])


def shown(shapes: Mapping[str, Shape], names: Sequence[str]) -> str:
    """Some of these tensors with their shapes, for a message."""
    some = ", ".join(f"{name} {shapes[name]}" for name in names[:SHOWN])
    return some + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_shapes(file: Path) -> dict[str, Shape]:
    """Names and shapes of the tensors in a file of safetensors, from its header; empty if it is none."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if 0 < size <= LARGEST_HEADER else {}
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def head_problems(key: str, role: Role) -> Iterator[Problem]:
    """What is wrong with the head of the model at ``key``, as far as its directory is on this machine."""
    model: ModelConfig | None = unless_absent(lambda: role.config.model, None)
    if model is None or model.path is None or role.head is False or model.head_init is not None:
        return
    path, config = Path(model.path), model_config_file(model)
    if is_adapter(path) or encoder_type(config) is not None:
        return
    shapes: dict[str, Shape] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= read_shapes(file)
    if not shapes:
        return
    prefix = (
        model.value_head_prefix
        if model.value_head_prefix != HEAD_NAME
        else config.get("value_head_prefix") or HEAD_NAME
    )
    problem = refusal(shapes, config, prefix, model.path)
    if problem is not None:
        yield f"{key}.model.path", problem
    elif find_head(shapes, config, prefix) is None:
        yield (
            f"{key}.model.path",
            f"{model.path} has no score head called {prefix}: if it has one of another name, say so with {key}.model."
            f"value_head_prefix; if it is no reward model yet, {key}.model.head_init makes a fresh head",
        )
