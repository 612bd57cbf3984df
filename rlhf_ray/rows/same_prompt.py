"""When two rows have the same prompt: exactly, or but for how it is written.

Invariants: a prompt that is one message of the user is the same as its text; prompts that differ only in case, in blanks, in
the Unicode form of their characters or in the marks at their end are nearly the same, and no others are, so that ``2 + 3`` and
``2 - 3`` stay two prompts.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

END_MARKS = " .?!:;…"


def hash_prompt(
    prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, *, nearly: bool = False
) -> str:
    """A hash that two rows share if they have the same prompt and tools; with ``nearly`` also if they nearly have.

    Blanks around a prompt never count.
    """
    if not isinstance(prompt, str) and len(prompt) == 1 and dict(prompt[0]).keys() == {"role", "content"} and not tools:
        (message,) = prompt
        if message["role"] == "user" and isinstance(message["content"], str):
            prompt = message["content"]
    content = prompt if isinstance(prompt, str) else [list(prompt), tools]
    written = _written_plainly(content) if nearly else content.strip() if isinstance(content, str) else content
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:32]


def _written_plainly(value: Any) -> Any:
    """A value with every text in it in one Unicode form and case, with single blanks and without marks at its end."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split()).rstrip(END_MARKS)
    if isinstance(value, Mapping):
        return {key: _written_plainly(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_written_plainly(inner) for inner in value]
    return value
