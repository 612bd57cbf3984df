"""Conversations written as text by the tokenizer's own chat template.

Invariants: a conversation is rendered once, as a whole, and nothing is added before, between or after its messages; a
tokenizer without a template, or a template that refuses the conversation, is an error that names the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.errors import DataError

Messages = Sequence[Mapping[str, Any]]


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answer_follows: bool = False,
    where: str = "",
) -> str:
    """The text of a conversation; with ``answer_follows`` it ends where the assistant begins to answer.

    ``where`` is the place of the row, for the :class:`DataError` that is raised where there is no such text.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: holds a conversation, but the tokenizer has no chat template: start from a model whose tokenizer has "
            "one, put a chat_template.jinja beside its tokenizer.json, or write the rows as plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            tokenize=False,
            add_generation_prompt=answer_follows,
        )
    except Exception as error:  # a template is a program, and may refuse a conversation with any error
        raise DataError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from error
    return str(text)
