"""What the ``adapter_config.json`` of a LoRA adapter may ask for.

Invariant: an option that changes what an adapter computes is either read with PEFT's own meaning or is listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def why_refused(content: Mapping[str, Any]) -> str | None:
    """Say what an adapter uses that is not read, with the way out; None if all of it is."""
    kind = content.get("peft_type")
    if kind != "LORA":
        return f"is of type {kind}, and only LoRA adapters are supported: {MERGE}"
    used = {name: content.get(name) for name in UNSUPPORTED}
    used = {name: value for name, value in used.items() if value and value != "none"}
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        used["init_lora_weights"] = start
    if not used:
        return None
    return f"uses {', '.join(f'{name} ({value!r})' for name, value in used.items())}, which is not supported: {MERGE}"
