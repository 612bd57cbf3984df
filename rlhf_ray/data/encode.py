"""From rows to token ids.

Always true: a row is encoded whole or dropped and counted, its end is never cut; an answer ends in exactly one
end-of-sequence token; a prompt has the same ids wherever it stands: alone, where it is sampled from, before a demonstration
and before both sides of a pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_ray.console import progress
from rlhf_ray.data.demonstrations import Demonstration
from rlhf_ray.data.preferences import PreferencePair
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.errors import DataError

Ids = list[int]
Drops = Counter[str]
"""How many rows were dropped, by reason."""


class EncodedPair(NamedTuple):
    """Both sides with the prompt before each, and how many tokens that is."""

    chosen: Ids
    rejected: Ids
    prompt_length: int


TEXTS_AT_ONCE = 1024
"""Enough to be fast, few enough to hold little besides the ids."""
TOO_LONG, EQUAL, EMPTY = "too long", "with two equal sides", "without a token"


def encode_answers(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[Ids, list[Ids]]:
    """Ids of a prompt with the special tokens that the tokenizer begins a text with, and of each answer after it."""
    ((before, after),) = _continued(tokenizer, [prompt], [answers])
    return before, after


def encode_prompt(tokenizer: Any, prompt: Prompt, max_tokens: int) -> Ids | None:
    """Ids of one prompt; none where it is dropped."""
    return encode_prompts(tokenizer, [prompt], max_tokens, Drops())[0]


def encode_demonstration(tokenizer: Any, row: Demonstration, max_tokens: int) -> tuple[Ids, list[bool]] | None:
    """Ids of prompt and answer, and which of them are the answer (its end included); none where it is dropped."""
    return encode_demonstrations(tokenizer, [row], max_tokens, Drops())[0]


def encode_pair(tokenizer: Any, row: PreferencePair, max_tokens: int) -> EncodedPair | None:
    """Ids of both sides with the prompt before each; none where one is too long, or both are the same."""
    return encode_pairs(tokenizer, [row], max_tokens, Drops())[0]


def encode_prompts(tokenizer: Any, rows: Sequence[Prompt], max_tokens: int, drops: Drops) -> list[Ids | None]:
    """One entry a row, none for those that are dropped, which ``drops`` counts."""
    encoded = _prompt_ids(tokenizer, [row.text for row in rows])
    return [_kept(ids, _length_problem(ids, max_tokens), drops) for ids in encoded]


def encode_demonstrations(
    tokenizer: Any, rows: Sequence[Demonstration], max_tokens: int, drops: Drops
) -> list[tuple[Ids, list[bool]] | None]:
    """One entry a row, none for those that are dropped, which ``drops`` counts."""
    encoded = _continued(tokenizer, [row.prompt for row in rows], [[row.answer] for row in rows])
    results = []
    for prompt, (answer,) in encoded:
        example = (prompt + answer, [False] * len(prompt) + [True] * len(answer))
        results.append(_kept(example, _length_problem(prompt, max_tokens - len(answer)), drops))
    return results


def encode_pairs(
    tokenizer: Any, rows: Sequence[PreferencePair], max_tokens: int, drops: Drops
) -> list[EncodedPair | None]:
    """One entry a row, none for those that are dropped, which ``drops`` counts."""
    encoded = _continued(tokenizer, [row.prompt for row in rows], [[row.chosen, row.rejected] for row in rows])
    results = []
    for prompt, (chosen, rejected) in encoded:
        longest = max(len(chosen), len(rejected))
        problem = EQUAL if chosen == rejected else _length_problem(prompt, max_tokens - longest)
        results.append(_kept(EncodedPair(prompt + chosen, prompt + rejected, len(prompt)), problem, drops))
    return results


def _length_problem(prompt: Ids, max_tokens: int) -> str:
    if not prompt:
        return EMPTY
    return TOO_LONG if len(prompt) > max_tokens else ""


def _kept(example: Any, problem: str, drops: Drops) -> Any:
    if problem:
        drops[problem] += 1
    return None if problem else example


# ----------------------------------------------------------------------------------------------------------------- texts


def _continued(tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[tuple[Ids, list[Ids]]]:
    """For each row the ids of its prompt, and of each answer after it.

    An answer has the ids that it has in the joined text where these begin with the ids of the prompt (a tokenizer that puts
    a space before every text would put one before the answer), else those that it has alone.
    """
    before = _prompt_ids(tokenizer, prompts)
    rows = [row for row, texts in enumerate(answers) for _ in texts]
    texts = [text for several in answers for text in several]
    joined = _prompt_ids(tokenizer, [prompts[row] + text for row, text in zip(rows, texts, strict=True)])
    parted = [item for item, row in enumerate(rows) if joined[item][: len(before[row])] != before[row]]
    alone = dict(zip(parted, _tokenize(tokenizer, [texts[item] for item in parted], special=False), strict=True))
    results: list[tuple[Ids, list[Ids]]] = [(prompt, []) for prompt in before]
    for item, row in enumerate(rows):
        after = alone[item] if item in alone else joined[item][len(before[row]) :]
        results[row][1].append(_ended(tokenizer, after))
    return results


def _prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of texts that go on: begun as the tokenizer begins a text, once; an end that it puts by itself is taken off."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = _tokenize(tokenizer, texts, special=True)
    for text, ids in zip(texts, encoded, strict=True):
        if start is not None and ids[:2] == [start, start]:
            del ids[0]
        if end is not None and ids[-1:] == [end] and not text.endswith(tokenizer.eos_token):
            del ids[-1]
    return encoded


def _tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[Ids]:
    parts = [list(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)]
    encoded: list[Ids] = []
    for part in parts if len(parts) < 2 else progress(parts, f"tokenizing {len(texts)} texts"):
        encoded += tokenizer(part, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return encoded


def _ended(tokenizer: Any, answer: Ids) -> Ids:
    """The answer with one end after it, whether its text had one, several or none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end: give it an eos_token")
    length = len(answer)
    while length and answer[length - 1] == end:
        length -= 1
    return [*answer[:length], end]
