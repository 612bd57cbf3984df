"""How long a sequence a model reads, as its ``config.json`` says it under whichever name.

Invariant: a model is trained, served and asked for log-probs up to the same length, whoever reads its config: ``check`` from
the file, a run from the config that transformers made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length", "model_max_length")
"""Keys that hold the number of positions; the first that is there counts."""
BEHIND_PADDING = {
    "camembert", "data2vec-text", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Models that number the tokens of a text from the pad token's id plus one, and so read that many fewer."""
ORIGINAL = "original_max_position_embeddings"
FIXED = {"default", "linear", "llama3", "mrope", "proportional", "yarn"}
"""Types of RoPE whose frequencies follow from the config alone. Any other type is taken to depend on a sequence's length."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ``config.json`` that describes the language model; the whole where there is no other part."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model of a ``config.json`` reads; None where that is not said, or has no bound."""
    text = text_part(config)
    positions = next((text[name] for name in NAMES if isinstance(text.get(name), int) and text[name] > 0), None)
    if positions is None:
        return None
    if text.get("model_type") in BEHIND_PADDING:
        padding = text.get("pad_token_id")
        return int(positions) - 1 - (padding if isinstance(padding, int) else 1)
    return max([int(positions), *(_extended(int(positions), rope) for rope in rope_parameters(config))])


def rope_parameters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of RoPE of each type of layers, under the name of any version of transformers."""
    text = text_part(config)
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    by_layer_type = [one for one in parameters.values() if isinstance(one, Mapping)]
    return by_layer_type or [parameters]


def longest_rotated_alike(config: Mapping[str, Any]) -> int | None:
    """Up to how many tokens RoPE rotates all sequences alike; None if that is so at any length, 0 if at none."""
    text = text_part(config)
    varying = [rope for rope in rope_parameters(config) if rope_type(rope) not in FIXED]
    limits = [
        text.get(
            ORIGINAL, rope.get(ORIGINAL, text.get("max_position_embeddings") if rope_type(rope) == "dynamic" else 0)
        )
        for rope in varying
    ]
    return min((int(limit or 0) for limit in limits), default=None)


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The type that parameters of RoPE name."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def too_long(longest: int, model: str, positions: int, config: Mapping[str, Any]) -> str:
    """The sentence that refuses sequences of ``longest`` tokens for a model with fewer positions."""
    text = text_part(config)
    name = next((name for name in NAMES if name in text), NAMES[0])
    rotates = any(key in text for key in ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct"))
    more = f", or, if the model was trained on longer ones, raise {name} in its config.json" if rotates else ""
    return f"{longest} is more than {model} reads: lower it to {positions}{more}"


def _extended(positions: int, rope: Mapping[str, Any]) -> int:
    """To how many positions a scaling stretches those that were trained, where the config counts only these."""
    factor = rope.get("factor")
    if not isinstance(factor, int | float):
        return positions
    if rope_type(rope) == "dynamic":
        return int(positions * factor)
    original = rope.get("original_max_position_embeddings")
    return int(original * factor) if rope_type(rope) == "yarn" and isinstance(original, int) else positions
