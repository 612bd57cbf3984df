"""How large a model is: what decides the memory and the time of training, scoring and sampling with it.

Invariant: counts follow from the names and shapes of weights and from ``config.json`` alone; no tensor is read, and no name of
an architecture is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.files.positions import text_part
from rlhf_ray.config.files.score_heads import Shape
from rlhf_ray.config.sections.models import MADE_SHAPES, ModelConfig
from rlhf_ray.environment import is_hub_id
from rlhf_ray.planning.checkpoints import EMBEDDINGS, OUTPUT, adapted, shapes_of


@dataclass(frozen=True)
class ModelSize:
    """Counts of the numbers in a model's weights, and its widths."""

    numbers: int
    """All numbers of the weights, adapters included; tied weights count once."""
    trained: int
    """Those that an optimizer changes: adapters alone where there are some."""
    four_bit: int
    """Those that NF4 holds in half a byte each."""
    vectors: int
    """Those of norms and biases, which ZeRO-3 keeps whole on every rank."""
    largest: int
    """Those of the largest single weight, mostly the embedding."""
    layers: int
    hidden: int
    width: int
    """Of the MLP that a token passes through; in a mixture, of all experts that it is sent to."""
    query: int
    """Width of all query heads of a layer together."""
    key_value: int
    """Width of all key (or value) heads of a layer together."""
    vocabulary: int
    """Zero for a model with a score head, which has no output layer."""
    normed_heads: bool
    """Whether queries and keys have norms of their own, as in Qwen3."""
    tied: bool = False
    """Whether the embedding is the output layer too."""
    key_value_heads: int = 1
    """Heads of keys (or values) in a layer."""

    @property
    def frozen(self) -> int:
        """Numbers that no optimizer changes."""
        return self.numbers - self.trained


def model_size(role: Role, shapes: Mapping[str, Shape] | None = None) -> ModelSize | None:
    """The size of a role's model; None where its files do not tell it.

    ``shapes`` are the names and shapes of its weights; by default they are read from the headers of their files.
    """
    model = role.config.model
    found = dict(shapes_of(model) if shapes is None else shapes)
    widths = _widths(model)
    if widths is None or not any(".lora_" not in name for name in found):
        return None
    if role.head or widths.get("tie_word_embeddings"):
        found = {name: shape for name, shape in found.items() if not name.endswith(OUTPUT)}
    base = {name: shape for name, shape in found.items() if ".lora_" not in name}
    adapters = {name: shape for name, shape in found.items() if ".lora_" in name}
    numbers, trained = sum(map(prod, found.values())), 0
    if adapters:
        trained = sum(map(prod, adapters.values()))
    elif model.lora is not None:
        trained = sum(model.lora.rank * sum(shape) for shape in adapted(base, model.lora).values())
        numbers += trained
    elif role.trained:
        trained = numbers
    return ModelSize(
        numbers=numbers,
        trained=trained if role.trained else 0,
        four_bit=_four_bit(base) if model.quantization == "nf4" else 0,
        vectors=sum(prod(shape) for shape in base.values() if len(shape) < 2),
        largest=max(map(prod, base.values())),
        layers=_number(widths, "num_hidden_layers", "n_layer"),
        hidden=_number(widths, "hidden_size", "n_embd"),
        width=_width(widths),
        query=_number(widths, "num_attention_heads", "n_head") * _head(widths),
        key_value=_number(widths, "num_key_value_heads", "num_attention_heads", "n_head") * _head(widths),
        vocabulary=0 if role.head else _number(widths, "vocab_size"),
        normed_heads=any("q_norm" in name for name in base),
        tied=not role.head and not any(name.endswith(OUTPUT) for name in base),
        key_value_heads=_number(widths, "num_key_value_heads", "num_attention_heads", "n_head"),
    )


def located(model: ModelConfig) -> ModelConfig:
    """The section with the directory of the model: for a hub id that in the hub's cache, where it is there. Asks no hub."""
    if model.path is None or not is_hub_id(model.path):
        return model
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return model.model_copy(update={"path": str(Path(cached).parent)}) if isinstance(cached, str) else model


def _widths(model: ModelConfig) -> Mapping[str, Any] | None:
    """The keys of ``config.json`` that state widths, under transformers' names; None where there is none to read."""
    if model.make is not None:
        made = MADE_SHAPES[model.make.shape]
        return {
            "num_hidden_layers": made.layers, "hidden_size": made.hidden, "intermediate_size": made.intermediate,
            "num_attention_heads": made.heads, "num_key_value_heads": made.key_value_heads, "head_dim": made.head_dim,
            "vocab_size": model.make.vocabulary,
        }  # fmt: skip
    content = model_config_file(model)
    widths = {**text_part(content)}
    if "tie_word_embeddings" in content:
        widths["tie_word_embeddings"] = content["tie_word_embeddings"]
    return (
        widths
        if _number(widths, "hidden_size", "n_embd") and _number(widths, "num_attention_heads", "n_head")
        else None
    )


def _number(widths: Mapping[str, Any], *names: str) -> int:
    return next((widths[name] for name in names if isinstance(widths.get(name), int)), 0)


def _head(widths: Mapping[str, Any]) -> int:
    return _number(widths, "head_dim") or _number(widths, "hidden_size", "n_embd") // _number(
        widths, "num_attention_heads", "n_head"
    )


def _width(widths: Mapping[str, Any]) -> int:
    experts, each = _number(widths, "num_experts_per_tok"), _number(widths, "moe_intermediate_size")
    if experts:
        return experts * (each or _number(widths, "intermediate_size"))
    return _number(widths, "intermediate_size", "n_inner") or 4 * _number(widths, "hidden_size", "n_embd")


def _four_bit(shapes: Mapping[str, Shape]) -> int:
    """Numbers of linear layers, which NF4 packs; embeddings, output layers and experts in 3-D weights stay as they are."""
    return sum(
        prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and not name.endswith(OUTPUT) and not any(part in name for part in EMBEDDINGS)
    )
