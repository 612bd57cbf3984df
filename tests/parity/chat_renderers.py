"""Conversations as prime-rl's renderers write them in code, against the templates of the same models read here.

What is compared is what a policy is given and the token that ends its answer. Left out are renderers whose template lies in no
package (prime-qwen3, kimi-k2.5, inkling, glm-5, laguna-m.1), those that were written after another version of the template that
there is (llama-3.2 writes another day, minimax-m2 the message of the system of M2.5, laguna-xs older tags, deepseek-v4 other
newlines, deepseek-v3 no opening of a think block), and gpt-oss, which fetches a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rlhf_ray.data.chat import ChatFormat

from .chat_template_sources import fetch
from .chat_templates import make_tokenizer

TEMPLATES: Mapping[str, str] = {
    "qwen3": "llcpp__Qwen-Qwen3-0.6B",
    "qwen3.5": "llcpp__Qwen3.5-4B",
    "qwen3.6": "trl__qwen3_6",
    "qwen3.8": "trl__qwen3_8",
    "qwen3-vl": "trl__qwen3_vl",
    "llama-3": "llcpp__meta-llama-Llama-3.1-8B-Instruct",
    "gemma4": "trl__gemma4_v5",
    "glm-4.5": "trl__glm4moe",
    "hy3": "llcpp__tencent-Hy3",
    "laguna-s-2.1": "llcpp__poolside-Laguna-S-2.1",
    "nemotron-3": "llcpp__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nemotron-3-ultra": "trl__nemotron_3_ultra",
    "nemotron-3.5": "trl__nemotron_3_5_lightning",
}
"""The template that each renderer was written after."""
STARTS = {"llama-3": "<|begin_of_text|>"}
END_OF_TEXT = ("<|endoftext|>",)
BESIDES: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("qwen3", "qwen3.5", "qwen3.6", "qwen3.8"), END_OF_TEXT),
    "qwen3-vl": (*END_OF_TEXT, "</think>"),
    "llama-3": ("<|end_of_text|>",),
    "gemma4": (
        "<eos>",
        *(token for name in ("tool", "tool_call", "tool_response", "image") for token in (f"<|{name}>", f"<{name}|>")),
    ),
    "glm-4.5": ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "hy3": (
        *(f"<｜{name}:opensource｜>" for name in ("hy_begin_of_sentence", "hy_User", "hy_Assistant", "reasoning_mode")),
        "<tool_sep:opensource>",
        *(
            f"<{slash}{name}:opensource>"
            for name in ("think", "tool_calls", "tool_call", "arg_key", "arg_value", "tool_responses", "tool_response")
            for slash in ("", "/")
        ),
    ),
    "laguna-s-2.1": ("〈|EOS|〉",),
}
"""Tokens that a renderer asks for, and its template does not spell out."""
USER = {"role": "user", "content": "What is 2 + 3?"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def make_inputs() -> dict[str, Any]:
    """Conversations that the assistant is to answer next."""
    hello = {"role": "user", "content": "Hello"}
    conversations = {
        "one turn": {"messages": [USER]},
        "system": {"messages": [{"role": "system", "content": "Be brief."}, USER]},
        "two turns": {"messages": [hello, {"role": "assistant", "content": "Hello there."}, USER]},
        "earlier thinking": {
            "messages": [hello, {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."}, USER]
        },
        "tools": {"messages": [{"role": "system", "content": "Be brief."}, USER], "tools": [TOOL]},
    }
    return {"renderers": list(TEMPLATES), "conversations": conversations}


@cache
def _formats() -> dict[str, ChatFormat]:
    with TemporaryDirectory() as folder:
        templates = fetch(Path(folder))
    return {name: ChatFormat(_tokenizer(name, templates[source])) for name, source in TEMPLATES.items()}


def _tokenizer(name: str, template: str) -> Any:
    return make_tokenizer(TEMPLATES[name], template, start=STARTS.get(name, "<bos>"), besides=BESIDES.get(name, ()))


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """The cases, and the tokenizer of each renderer."""
    (directory / "cases.json").write_text(json.dumps(inputs))
    for name in inputs["renderers"]:
        _formats()[name].tokenizer.save_pretrained(directory / name)


def ours(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same by this project."""
    return dict(_ours(inputs))


def _ours(inputs: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for name in inputs["renderers"]:
        chat = _formats()[name]
        for case, conversation in inputs["conversations"].items():
            ids = chat.prompt_ids(conversation["messages"], conversation.get("tools"))
            yield f"{name}/{case}/prompt", np.array(ids)
            yield f"{name}/{case}/end", np.array([chat.end_token_id])
