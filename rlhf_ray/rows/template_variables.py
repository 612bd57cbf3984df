"""Variables of a chat template that a row, an item or a config may set.

Invariant: a variable never takes the place of an argument that decides how a conversation is rendered, such as the template
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"
"""The column, and the key of an item, that holds variables: TRL's and vLLM's name."""
ARGUMENTS = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
})  # fmt: skip
"""Names that mean something else to transformers' ``apply_chat_template``, or to the template."""


def variables_problem(variables: Any) -> str:
    """Why these cannot be variables of a template; empty where they can. It continues the words "must be a mapping"."""
    if not isinstance(variables, Mapping):
        return f", this is of type {type(variables).__name__}"
    unnamed = next((name for name in variables if not isinstance(name, str)), None)
    if unnamed is not None:
        return f" with texts as its keys, one is of type {type(unnamed).__name__}"
    taken = ", ".join(sorted(ARGUMENTS & variables.keys()))
    return f" of variables, but these are not the template's own: {taken}" if taken else ""
