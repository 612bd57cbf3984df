"""Encoding rows as token ids.

Invariants:

- A row is encoded whole, or dropped and counted. Only the prompt of a pair may be cut, at its beginning and equally in both
  sides, where the config asks for it; an end is never cut.
- An answer that is text ends in exactly one end-of-sequence token; a conversation ends as its chat template ends it.
- A prompt that is text has the same ids wherever it stands: alone, before a demonstration, and before both sides of a pair.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from rlhf_ray.console import progress
from rlhf_ray.data.chat import Messages, render
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt

Row = TypeVar("Row")
Encoded = TypeVar("Encoded")
Example = TypeVar("Example")
Ids = list[int]
Drops = Counter[str]
"""How many rows were dropped, by reason."""


class EncodedPair(NamedTuple):
    """Token ids of both sides of a pair."""

    chosen: Ids
    """The prompt and the better answer."""
    rejected: Ids
    """The prompt and the worse answer."""
    prompt_length: int
    """Tokens of the prompt that both sides begin with."""
    cut: int = 0
    """Tokens that the prompt has lost at its beginning."""


ROWS_AT_ONCE = 256
"""Enough for the tokenizer to be fast; few enough to need little memory besides the ids, and to show progress."""
TOO_LONG, EQUAL, EMPTY = "too long", "with two equal sides", "without a token"
"""Reasons to drop a row, as they are logged."""


def encode_answers(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[Ids, list[Ids]]:
    """Ids of a prompt with the special tokens that the tokenizer begins a text with, and of each answer after it."""
    ((prompt_ids, answer_ids),) = _encode_answers(tokenizer, [prompt], [answers])
    return prompt_ids, answer_ids


def encode_in_parts(rows: Sequence[Row], what: str, encode: Callable[[Sequence[Row]], Encoded]) -> Iterator[Encoded]:
    """``encode`` each stretch of ``ROWS_AT_ONCE`` rows, in their order; ``what`` names the rows in the progress bar.

    The tokenizers release Python's lock while they work, so the stretches are encoded by several threads.
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
    """The ids of each prompt; none for one that is dropped, which ``drops`` counts."""
    encoded = encode_in_parts(rows, "prompts", lambda part: _encode_prompt_part(tokenizer, part))
    return [_keep_or_drop(ids, _length_problem(ids, max_tokens), drops) for part in encoded for ids in part]


def render_prompt(tokenizer: Any, row: Prompt) -> str:
    """The text that answers are sampled to; a conversation as the tokenizer's chat template writes it, up to the answer."""
    if row.messages is None:
        return row.text
    return render(tokenizer, row.messages, tools=row.tools, answer_follows=True, where=row.where)


def _encode_prompt_part(tokenizer: Any, rows: Sequence[Prompt]) -> list[Ids]:
    """A text begins as the tokenizer begins a text; to a conversation nothing is added that its template did not write."""
    texts = [index for index, row in enumerate(rows) if row.messages is None]
    talks = [index for index, row in enumerate(rows) if row.messages is not None]
    ids = dict(zip(texts, _tokenize_prompts(tokenizer, [rows[index].text for index in texts]), strict=True))
    rendered = [render_prompt(tokenizer, rows[index]) for index in talks]
    ids |= zip(talks, _tokenize(tokenizer, rendered, special=False), strict=True)
    return [ids[index] for index in range(len(rows))]


def encode_demonstrations(
    tokenizer: Any, rows: Sequence[Demonstration], max_tokens: int, drops: Drops
) -> list[tuple[Ids, list[bool]] | None]:
    """Ids of prompt and answer, and which of them are the answer, its end included.

    None for a row that is dropped, which ``drops`` counts.
    """

    def encode(part: Sequence[Demonstration]) -> list[tuple[Ids, list[Ids]]]:
        return _encode_answers(tokenizer, [row.prompt for row in part], [[row.answer] for row in part])

    results = []
    for prompt, (answer,) in chain.from_iterable(encode_in_parts(rows, "demonstrations", encode)):
        example = (prompt + answer, [False] * len(prompt) + [True] * len(answer))
        results.append(_keep_or_drop(example, _length_problem(prompt, max_tokens - len(answer)), drops))
    return results


def encode_pairs(
    tokenizer: Any, rows: Sequence[PreferencePair], max_tokens: int, drops: Drops, *, cut_prompt: bool = False
) -> list[EncodedPair | None]:
    """The ids of each pair; none for one that is dropped, which ``drops`` counts."""

    def encode(part: Sequence[PreferencePair]) -> list[EncodedPair | str]:
        return encode_pair_part(tokenizer, part, max_tokens, cut_prompt=cut_prompt)

    outcomes = list(chain.from_iterable(encode_in_parts(rows, "pairs", encode)))
    drops.update(outcome for outcome in outcomes if isinstance(outcome, str))
    return [None if isinstance(outcome, str) else outcome for outcome in outcomes]


def encode_pair_part(
    tokenizer: Any, rows: Sequence[PreferencePair], max_tokens: int, *, cut_prompt: bool = False
) -> list[EncodedPair | str]:
    """The ids of each pair, or why it is dropped; all at once, so of few pairs."""
    texts = iter(_encode_texts(tokenizer, [row.texts for row in rows if row.texts is not None]))
    talks = iter(_encode_conversations(tokenizer, [(row, sides) for row in rows if (sides := row.conversations)]))
    pairs = [next(talks if row.texts is None else texts) for row in rows]
    return [_fit(pair, max_tokens, tokenizer.bos_token_id, cut_prompt=cut_prompt) for pair in pairs]


def _fit(pair: EncodedPair, max_tokens: int, start: int | None, *, cut_prompt: bool) -> EncodedPair | str:
    """The pair within the limit, or why it is dropped; ``start`` is the token that begins a text, which is not cut off."""
    if pair.chosen == pair.rejected:
        return EQUAL
    excess = max(len(pair.chosen), len(pair.rejected)) - max_tokens
    if excess <= 0:
        return pair
    starts = int(
        pair.prompt_length > 0 and pair.chosen[0] == start
    )  # 1 where the prompt begins with that token, else 0
    if not cut_prompt or pair.prompt_length - starts <= excess:
        return TOO_LONG
    chosen, rejected = (side[:starts] + side[starts + excess :] for side in pair[:2])
    return EncodedPair(chosen, rejected, pair.prompt_length - excess, excess)


def _encode_texts(tokenizer: Any, rows: Sequence[tuple[str, str, str]]) -> list[EncodedPair]:
    encoded = _encode_answers(tokenizer, [prompt for prompt, _, _ in rows], [answers for _, *answers in rows])
    return [EncodedPair(prompt + chosen, prompt + rejected, len(prompt)) for prompt, (chosen, rejected) in encoded]


def _encode_conversations(
    tokenizer: Any, rows: Sequence[tuple[PreferencePair, tuple[Messages, Messages, Messages]]]
) -> list[EncodedPair]:
    texts: list[str] = []
    for row, (prompt, *answers) in rows:
        sides = [render(tokenizer, [*prompt, *answer], tools=row.tools, where=row.where) for answer in answers]
        texts += [*sides, _render_shared_prompt(tokenizer, row, prompt, sides)]
    ids = _tokenize(tokenizer, texts, special=False)
    pairs = []
    # Three texts a row were tokenized: its chosen side, its rejected side, and what both begin with.
    for chosen, rejected, shared in zip(ids[0::3], ids[1::3], ids[2::3], strict=True):
        begins_both = chosen[: len(shared)] == rejected[: len(shared)] == shared
        pairs.append(EncodedPair(chosen, rejected, len(shared) if begins_both else 0))
    return pairs


def _render_shared_prompt(tokenizer: Any, row: PreferencePair, prompt: Messages, sides: Sequence[str]) -> str:
    """What both sides begin with before the assistant's answer; empty where the template cannot write a prompt alone."""
    for answer_follows in (True, False):
        try:
            text = render(tokenizer, prompt, tools=row.tools, answer_follows=answer_follows)
        except DataError:  # some templates refuse a conversation that does not end with an answer
            continue
        if all(side.startswith(text) for side in sides):
            return text
    return ""


def _length_problem(prompt: Ids, max_tokens: int) -> str:
    if not prompt:
        return EMPTY
    return TOO_LONG if len(prompt) > max_tokens else ""


def _keep_or_drop(example: Example, problem: str, drops: Drops) -> Example | None:
    if problem:
        drops[problem] += 1
    return None if problem else example


def _encode_answers(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[tuple[Ids, list[Ids]]]:
    """For each row the ids of its prompt, and of each answer after it.

    An answer has the ids that it has in the joined text where these begin with the ids of the prompt (a tokenizer that puts
    a space before every text would put one before the answer), else those that it has alone.
    """
    prompt_ids = _tokenize_prompts(tokenizer, prompts)
    rows = [row for row, texts in enumerate(answers) for _ in texts]
    texts = [text for several in answers for text in several]
    joined = _tokenize_prompts(tokenizer, [prompts[row] + text for row, text in zip(rows, texts, strict=True)])
    split = [item for item, row in enumerate(rows) if joined[item][: len(prompt_ids[row])] != prompt_ids[row]]
    alone = dict(zip(split, _tokenize(tokenizer, [texts[item] for item in split], special=False), strict=True))
    results: list[tuple[Ids, list[Ids]]] = [(ids, []) for ids in prompt_ids]
    for item, row in enumerate(rows):
        answer = alone[item] if item in alone else joined[item][len(prompt_ids[row]) :]
        results[row][1].append(_with_one_end(tokenizer, answer))
    return results


def _tokenize_prompts(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of texts that something follows: begun once as the tokenizer begins a text, and without an end that it adds."""
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


def _with_one_end(tokenizer: Any, answer: Ids) -> Ids:
    """The answer with one end-of-sequence token, whether its text had one, several or none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end: give it an eos_token")
    length = len(answer)
    while length and answer[length - 1] == end:
        length -= 1
    return [*answer[:length], end]
