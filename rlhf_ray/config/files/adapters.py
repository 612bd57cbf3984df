"""What the ``adapter_config.json`` of a LoRA adapter may ask for.

Invariant: an option that changes what an adapter computes is either read with PEFT's own meaning or is listed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

UNSUPPORTED = (
    "use_dora", "bias", "lora_bias", "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "velora_config", "layer_replication", "megatron_config",
)  # fmt: skip
"""Options with which an adapter is more, or other, than ``scaling * B A`` on single layers."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How values of ``init_lora_weights`` begin with which PEFT also changes the weights of the base."""
MERGE = (
    "merge it into its base with PEFT (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)), and "
    "give that directory"
)
"""The way out that every adapter has."""


TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
NAMES, LAYERS, COUNTS = "a text or a list of texts", "a whole number or a list of them", "an object of whole numbers"
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "base_model_name_or_path": ("a text", lambda value: isinstance(value, str)),
    "revision": ("a text", lambda value: isinstance(value, str)),
    "task_type": ("a kind of task of PEFT", lambda value: value in TASKS),
    "r": ("a whole number above 0", lambda value: _is_count(value) and value > 0),
    "lora_alpha": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "lora_dropout": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "fan_in_fan_out": ("true or false", lambda value: isinstance(value, bool)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "init_lora_weights": ("true, false or a text", lambda value: isinstance(value, bool | str)),
    "bias": ("a text", lambda value: isinstance(value, str)),
    "target_modules": (NAMES, lambda value: isinstance(value, str) or _is_list(value, str)),
    "exclude_modules": (NAMES, lambda value: isinstance(value, str) or _is_list(value, str)),
    "layers_pattern": (NAMES, lambda value: isinstance(value, str) or _is_list(value, str)),
    "modules_to_save": ("a list of texts", lambda value: _is_list(value, str)),
    "layers_to_transform": (LAYERS, lambda value: _is_count(value) or _is_list(value, int)),
    "rank_pattern": (COUNTS, lambda value: isinstance(value, dict) and all(_is_count(one) for one in value.values())),
    "alpha_pattern": (
        "an object of numbers",
        lambda value: isinstance(value, dict) and _is_list([*value.values()], int, float),
    ),
}
"""What the options that are read may be, besides null."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kinds) and not isinstance(one, bool) for one in value)


def why_refused(content: Mapping[str, Any]) -> str | None:
    """Say what an adapter uses that is not read, with the way out; None if all of it is."""
    kind = content.get("peft_type")
    if kind != "LORA":
        return f"is of type {kind}, and only LoRA adapters are supported: {MERGE}"
    for name, (expected, is_right) in KINDS.items():
        value = content.get(name)
        if value is not None and not is_right(value):
            return (
                f"has {name} {json.dumps(value)[:80]} in its adapter_config.json, which must be {expected}: correct it"
            )
    used = {name: content.get(name) for name in UNSUPPORTED}
    used = {name: value for name, value in used.items() if value and value != "none"}
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        used["init_lora_weights"] = start
    if not used:
        return None
    return f"uses {', '.join(f'{name} ({value!r})' for name, value in used.items())}, which is not supported: {MERGE}"
