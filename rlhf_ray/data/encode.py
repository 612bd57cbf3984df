"""From rows to token ids.

Always true: a row is encoded whole or dropped, its end is never cut; plain text ends in exactly one end-of-sequence token
where an answer ends; a prompt gets none; the tokens of an answer are those of the answer alone, so that what is trained on
is what is sampled: prompt ids first, answer ids after them.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.data.demonstrations import Demonstration
from rlhf_ray.data.preferences import PreferencePair
from rlhf_ray.data.prompts import Prompt


def encode_prompt(tokenizer: Any, prompt: Prompt, max_tokens: int) -> list[int] | None:
    """Ids of a prompt with the special tokens that the tokenizer begins a text with; none where it is too long."""
    ids = _prompt_ids(tokenizer, prompt.text)
    return ids if 0 < len(ids) <= max_tokens else None


def encode_demonstration(tokenizer: Any, row: Demonstration, max_tokens: int) -> tuple[list[int], list[bool]] | None:
    """Ids of prompt and answer, and which of them are the answer (its end included); none where it is too long."""
    prompt = _prompt_ids(tokenizer, row.prompt)
    answer = _answer_ids(tokenizer, row.answer)
    ids = prompt + answer
    if len(ids) > max_tokens or not prompt:
        return None
    return ids, [False] * len(prompt) + [True] * len(answer)


def encode_pair(tokenizer: Any, row: PreferencePair, max_tokens: int) -> tuple[list[int], list[int]] | None:
    """Ids of both sides with the prompt before each; none where one is too long, or both are the same."""
    prompt = _prompt_ids(tokenizer, row.prompt)
    chosen = prompt + _answer_ids(tokenizer, row.chosen)
    rejected = prompt + _answer_ids(tokenizer, row.rejected)
    if max(len(chosen), len(rejected)) > max_tokens or chosen == rejected:
        return None
    return chosen, rejected


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that an answer follows: an end that the tokenizer puts by itself is taken off again."""
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _answer_ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
