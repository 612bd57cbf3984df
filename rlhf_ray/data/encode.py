"""From rows to token ids.

Always true: a row is encoded whole or dropped and counted; where that is asked for, the prompt of a pair loses its beginning,
the same in both sides; the end is never cut. An answer that is text ends in exactly one end-of-sequence token, a
conversation as its template ends it; a prompt that is text has the same ids wherever it stands: alone, where it is sampled
from, before a demonstration and before both sides of a pair.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from rlhf_ray.console import progress
from rlhf_ray.data.chat import render
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt

Row = TypeVar("Row")
Encoded = TypeVar("Encoded")
Ids = list[int]
Drops = Counter[str]
"""How many rows were dropped, by reason."""


class EncodedPair(NamedTuple):
    """Both sides with the prompt before each, how many tokens that is, and how many it has lost."""

    chosen: Ids
    rejected: Ids
    prompt_length: int
    cut: int = 0


ROWS_AT_ONCE = 256
"""Enough to be fast, few enough to hold little besides the ids and to show progress."""
TOO_LONG, EQUAL, EMPTY = "too long", "with two equal sides", "without a token"


def encode_answers(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[Ids, list[Ids]]:
    """Ids of a prompt with the special tokens that the tokenizer begins a text with, and of each answer after it."""
    ((before, after),) = _continued(tokenizer, [prompt], [answers])
    return before, after


def in_parts(rows: Sequence[Row], what: str, encode: Callable[[Sequence[Row]], Encoded]) -> Iterator[Encoded]:
    """What ``encode`` makes of each stretch of ``rows``, in their order; shows progress where there are several.

    The tokenizers' own code runs outside of Python's lock, so threads work side by side.
    """
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    if len(parts) < 2:
        yield from map(encode, parts)
        return
    yield encode(parts[0])  # alone: the first call settles the tokenizer's own switches
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        rest = threads.map(encode, parts[1:])
        yield from progress(rest, f"encoding {len(rows)} {what}, {ROWS_AT_ONCE} at a time", total=len(parts) - 1)


def encode_prompts(tokenizer: Any, rows: Sequence[Prompt], max_tokens: int, drops: Drops) -> list[Ids | None]:
    """One entry a row, none for those that are dropped, which ``drops`` counts."""
    encoded = in_parts(rows, "prompts", lambda part: _ids_of_prompts(tokenizer, part))
    return [_kept(ids, _length_problem(ids, max_tokens), drops) for part in encoded for ids in part]


def prompt_text(tokenizer: Any, row: Prompt) -> str:
    """The text that is sampled from; a conversation as the tokenizer's chat template writes it, up to the answer."""
    if row.messages is None:
        return row.text
    return render(tokenizer, row.messages, tools=row.tools, answer_follows=True, where=row.where)


def _ids_of_prompts(tokenizer: Any, rows: Sequence[Prompt]) -> list[Ids]:
    """Texts begun as the tokenizer begins one; a conversation as its template wrote it, with nothing added."""
    texts = [index for index, row in enumerate(rows) if row.messages is None]
    talks = [index for index, row in enumerate(rows) if row.messages is not None]
    ids = dict(zip(texts, _prompt_ids(tokenizer, [rows[index].text for index in texts]), strict=True))
    rendered = [prompt_text(tokenizer, rows[index]) for index in talks]
    ids |= zip(talks, _tokenize(tokenizer, rendered, special=False), strict=True)
    return [ids[index] for index in range(len(rows))]


def encode_demonstrations(
    tokenizer: Any, rows: Sequence[Demonstration], max_tokens: int, drops: Drops
) -> list[tuple[Ids, list[bool]] | None]:
    """One entry a row, none for those that are dropped, which ``drops`` counts."""

    def encode(part: Sequence[Demonstration]) -> list[tuple[Ids, list[Ids]]]:
        return _continued(tokenizer, [row.prompt for row in part], [[row.answer] for row in part])

    results = []
    for prompt, (answer,) in chain.from_iterable(in_parts(rows, "demonstrations", encode)):
        example = (prompt + answer, [False] * len(prompt) + [True] * len(answer))
        results.append(_kept(example, _length_problem(prompt, max_tokens - len(answer)), drops))
    return results


def encode_pairs(
    tokenizer: Any, rows: Sequence[PreferencePair], max_tokens: int, drops: Drops, *, cut_prompt: bool = False
) -> list[EncodedPair | None]:
    """One entry a row, none for those that are dropped, which ``drops`` counts."""

    def encode(part: Sequence[PreferencePair]) -> list[EncodedPair | str]:
        return pair_outcomes(tokenizer, part, max_tokens, cut_prompt=cut_prompt)

    outcomes = list(chain.from_iterable(in_parts(rows, "pairs", encode)))
    drops.update(outcome for outcome in outcomes if isinstance(outcome, str))
    return [None if isinstance(outcome, str) else outcome for outcome in outcomes]


def pair_outcomes(
    tokenizer: Any, rows: Sequence[PreferencePair], max_tokens: int, *, cut_prompt: bool = False
) -> list[EncodedPair | str]:
    """One entry a row: its ids, or why it is dropped."""
    talks = [row for row in rows if not isinstance(row.prompt, str)]
    texts = [row for row in rows if isinstance(row.prompt, str)]
    of_talks, of_texts = iter(_conversation_pairs(tokenizer, talks)), iter(_text_pairs(tokenizer, texts))
    whole = [next(of_texts if isinstance(row.prompt, str) else of_talks) for row in rows]
    return [_fitted(pair, max_tokens, tokenizer.bos_token_id, cut_prompt=cut_prompt) for pair in whole]


def _fitted(pair: EncodedPair, max_tokens: int, start: int | None, *, cut_prompt: bool) -> EncodedPair | str:
    """The pair within the limit, or why it is dropped; of a prompt that is cut its first token stays where it is a start."""
    if pair.chosen == pair.rejected:
        return EQUAL
    excess = max(len(pair.chosen), len(pair.rejected)) - max_tokens
    if excess <= 0:
        return pair
    first = int(pair.prompt_length > 0 and pair.chosen[0] == start)
    if not cut_prompt or pair.prompt_length - first <= excess:
        return TOO_LONG
    chosen, rejected = (side[:first] + side[first + excess :] for side in pair[:2])
    return EncodedPair(chosen, rejected, pair.prompt_length - excess, excess)


def _text_pairs(tokenizer: Any, rows: Sequence[PreferencePair]) -> list[EncodedPair]:
    encoded = _continued(tokenizer, [row.prompt for row in rows], [[row.chosen, row.rejected] for row in rows])
    return [EncodedPair(prompt + chosen, prompt + rejected, len(prompt)) for prompt, (chosen, rejected) in encoded]


def _conversation_pairs(tokenizer: Any, rows: Sequence[PreferencePair]) -> list[EncodedPair]:
    texts: list[str] = []
    for row in rows:
        sides = [
            render(tokenizer, [*row.prompt, *answer], tools=row.tools, where=row.where)
            for answer in (row.chosen, row.rejected)
        ]
        texts += [*sides, _rendered_prompt(tokenizer, row, sides)]
    ids = _tokenize(tokenizer, texts, special=False)
    pairs = []
    for chosen, rejected, prompt in zip(ids[0::3], ids[1::3], ids[2::3], strict=True):
        shared = chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
        pairs.append(EncodedPair(chosen, rejected, len(prompt) if shared else 0))
    return pairs


def _rendered_prompt(tokenizer: Any, row: PreferencePair, sides: Sequence[str]) -> str:
    """What both sides begin with before the assistant's answer, as far as the template can say it."""
    for answer_follows in (True, False):
        try:
            text = render(tokenizer, row.prompt, tools=row.tools, answer_follows=answer_follows)
        except DataError:  # some templates want a conversation to end with an answer
            continue
        if all(side.startswith(text) for side in sides):
            return text
    return ""


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
    if not texts:
        return []
    return list(tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"])


def _ended(tokenizer: Any, answer: Ids) -> Ids:
    """The answer with one end after it, whether its text had one, several or none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end: give it an eos_token")
    length = len(answer)
    while length and answer[length - 1] == end:
        length -= 1
    return [*answer[:length], end]
