"""When two tokenizers are the same: the parts of a ``tokenizer.json`` that decide which ids a text gets.

Invariant: two descriptions with equal identities give every text the same ids, whoever compares them: ``check`` compares
files, and a run compares the tokenizers that it loaded. The chat template, padding, truncation and the decoder do not count,
and neither does the pad token that this project adds behind all others to a tokenizer without one: no text is meant to hold it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

PARTS_THAT_DECIDE_IDS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
"""Keys of a ``tokenizer.json``; of its ``post_processor`` only the tokens count that it puts around a text."""
PAD_TOKEN = "<|pad|>"
"""The dedicated pad token, which reward models that were trained here have beside what their base has."""
TEXT = "text"
"""Stands for the ids of the text itself among the ids that a post-processor adds."""


def tokenizer_identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """What decides ids in the content of a ``tokenizer.json``, as plain JSON to be compared or hashed."""
    parts = {part: description.get(part) for part in PARTS_THAT_DECIDE_IDS}
    added = _without_dedicated_pad(description.get("added_tokens"))
    return {**parts, "added_tokens": added, "around_a_text": _around_a_text(description.get("post_processor"))}


def _without_dedicated_pad(added: Any) -> Any:
    """The added tokens, without the dedicated pad token where it is the last of them."""
    try:
        last = max(added, key=lambda token: token["id"])
        return [token for token in added if token is not last] if last["content"] == PAD_TOKEN else added
    except (TypeError, KeyError, ValueError):  # none, or not of the form that is known
        return added


def same_tokenizer_files(one: Path, other: Path) -> bool:
    """Whether two ``tokenizer.json`` files give the same ids; raises ``ValueError`` or ``OSError`` for one that is not JSON.

    The ``tokenizers`` library writes one tokenizer in several ways (merges as texts or as pairs, defaults written out or
    not), so files that look different are compared again as it writes them today.
    """
    texts = [file.read_text(encoding="utf-8") for file in (one, other)]
    if texts[0] == texts[1]:
        return True
    first, second = (tokenizer_identity(json.loads(text)) for text in texts)
    if first == second:
        return True
    first, second = (tokenizer_identity(json.loads(_written_anew(text))) for text in texts)
    return first == second


def _written_anew(text: str) -> str:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text).to_str()
    except Exception:  # the library raises bare Exceptions; loading the model reports what is wrong with the file
        return text


def _around_a_text(processor: Any) -> list[Any]:
    """The ids that a post-processor gives to a single text: those it adds, and ``TEXT`` in place of the text's own."""
    if processor is None:
        return [TEXT]
    try:
        return _READERS[processor["type"]](processor)
    except (AttributeError, KeyError, TypeError, IndexError):  # a kind that is not known here counts as a whole
        return [processor]


def _around_by_template(processor: Mapping[str, Any]) -> list[Any]:
    tokens = processor["special_tokens"]
    pieces = [entry for piece in processor["single"] for entry in piece.items()]  # each piece is {kind: details}
    ids = [tokens[piece["id"]]["ids"] if kind == "SpecialToken" else [TEXT] for kind, piece in pieces]
    return list(chain(*ids))


def _around_by_sequence(processor: Mapping[str, Any]) -> list[Any]:
    ids: list[Any] = [TEXT]
    for step in processor["processors"]:
        ids = list(chain(*(ids if outer == TEXT else [outer] for outer in _around_a_text(step))))
    return ids


def _around_by_bert(processor: Mapping[str, Any]) -> list[Any]:
    return [processor["cls"][1], TEXT, processor["sep"][1]]


_READERS: Mapping[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "ByteLevel": lambda _: [TEXT],  # it corrects offsets and adds nothing
    "TemplateProcessing": _around_by_template,
    "Sequence": _around_by_sequence,
    "BertProcessing": _around_by_bert,
    "RobertaProcessing": _around_by_bert,
}
