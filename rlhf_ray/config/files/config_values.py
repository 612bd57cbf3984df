"""The kinds of values that a ``config.json`` has under the keys that are read here.

Invariants: a value of another kind is a problem that names key and value, in the same words by ``check`` and by a run. No other
rule meets it: what :func:`readable` leaves has no such value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.config.files.positions import ORIGINAL, text_part

KINDS: Mapping[str, tuple[type, ...]] = {
    "model_type": (str,), "value_head_prefix": (str,), "text_config": (dict,), "quantization_config": (dict,),
    "rope_parameters": (dict,), "rope_scaling": (dict,), "architectures": (list,), "layer_types": (list,), "auto_map": (dict,),
    "mean": (int, float), "std": (int, float), "pad_token_id": (int, list), "eos_token_id": (int, list),
    "max_position_embeddings": (int, float), "n_positions": (int,), ORIGINAL: (int,), "vocab_size": (int,),
}  # fmt: skip
"""What a value may be, besides null."""
AT_LEAST_ONE = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings", "n_positions",
)  # fmt: skip
"""Keys of which every model has one or more. Models of pictures and sounds have a list of them."""
MODULE = re.compile(r"\w+(\.\w+)*")
WAY_OUT = "correct it there, or copy config.json again"
CALLED = {str: "text", dict: "an object", list: "a list", int: "a whole number", float: "a number"}


def wrong_values(config: Mapping[str, Any]) -> list[str]:
    """A sentence about each value of another kind, in the whole and in the part that describes the language model."""
    parts = [config] if text_part(config) is config else [config, text_part(config)]
    return [sentence for part in parts for _, sentence in _wrong(part)]


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without nulls and without values of another kind."""
    wrong = {name for name, _ in _wrong(config)}
    left = {name: value for name, value in config.items() if value is not None and name not in wrong}
    if "text_config" in left:
        left["text_config"] = readable(left["text_config"])
    return left


def _wrong(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, kinds in KINDS.items():
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or _holds_no_texts(name, value):
            called = (
                "a list of texts" if list in kinds and int not in kinds else " or ".join(CALLED[one] for one in kinds)
            )
            yield name, f"{name} is {json.dumps(value)[:80]} in its config.json, but must be {called}: {WAY_OUT}"
        elif name.startswith("rope_") and isinstance(value, dict):
            parts = [value, *(part for part in value.values() if isinstance(part, dict))]
            original = next((part[ORIGINAL] for part in parts if not isinstance(part.get(ORIGINAL, 0), int)), None)
            if original is not None:
                yield name, f"{name}.{ORIGINAL} is {json.dumps(original)}, but must be a whole number: {WAY_OUT}"
    head = config.get("value_head_prefix")
    if isinstance(head, str) and head and MODULE.fullmatch(head) is None:
        yield (
            "value_head_prefix",
            f"value_head_prefix is {head[:80]!r} in its config.json, which names no module: {WAY_OUT}",
        )
    for name in AT_LEAST_ONE:
        value = config.get(name)
        if isinstance(value, int) and value < 1:
            yield name, f"{name} is {value} in its config.json, but must be 1 or more: {WAY_OUT}"


def _holds_no_texts(name: str, value: Any) -> bool:
    return name in ("architectures", "layer_types") and not all(isinstance(one, str) for one in value)
