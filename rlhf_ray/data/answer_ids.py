"""Token ids of a prompt and of the answers after it: of texts, and of conversations that a chat template has written.

Invariants: a prompt has the same ids wherever it stands; an answer that is whole ends in exactly one end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from rlhf_ray.errors import DataError

Ids = list[int]
Tokenize = Callable[[Sequence[str]], list[Ids]]


def encode_answers(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[Ids, list[Ids]]:
    """Ids of a prompt with the special tokens that the tokenizer begins a text with, and of each answer after it."""
    ((prompt_ids, answer_ids),) = encode_text_answers(tokenizer, [prompt], [answers])
    return prompt_ids, answer_ids


def encode_text_answers(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[tuple[Ids, list[Ids]]]:
    """For each plain text the ids of the prompt, and of each answer after it with the tokenizer's end of sequence."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end: give it an eos_token")
    rows = join_answers(tokenizer, partial(tokenize_prompts, tokenizer), prompts, answers)
    return [(prompt, [with_one_end(answer, end) for answer in several]) for prompt, several in rows]


def join_answers(
    tokenizer: Any, begin: Tokenize, prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> list[tuple[Ids, list[Ids]]]:
    """For each row the ids of its prompt, which ``begin`` makes, and of each answer after it, without an end.

    An answer has the ids that it has in the joined text where these begin with the ids of the prompt (a tokenizer that puts
    a space before every text would put one before the answer), else those that it has alone.
    """
    prompt_ids = begin(prompts)
    rows = [row for row, texts in enumerate(answers) for _ in texts]
    texts = [text for several in answers for text in several]
    joined = begin([prompts[row] + text for row, text in zip(rows, texts, strict=True)])
    split = [item for item, row in enumerate(rows) if joined[item][: len(prompt_ids[row])] != prompt_ids[row]]
    alone = dict(zip(split, tokenize(tokenizer, [texts[item] for item in split]), strict=True))
    results: list[tuple[Ids, list[Ids]]] = [(ids, []) for ids in prompt_ids]
    for item, row in enumerate(rows):
        results[row][1].append(alone[item] if item in alone else joined[item][len(prompt_ids[row]) :])
    return results


def with_one_end(answer: Ids, end: int) -> Ids:
    """The answer with one end token, whether its text had one, several or none."""
    length = len(answer)
    while length and answer[length - 1] == end:
        length -= 1
    return [*answer[:length], end]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many letters or tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def tokenize_prompts(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of texts that something follows: begun once as the tokenizer begins a text, and without an end that it adds."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenize(tokenizer, texts, special=True)
    for text, ids in zip(texts, encoded, strict=True):
        if start is not None and ids[:2] == [start, start]:
            del ids[0]
        if end is not None and ids[-1:] == [end] and not text.endswith(tokenizer.eos_token):
            del ids[-1]
    return encoded


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
    """Ids of each text, with the special tokens that the tokenizer adds by itself only where ``special`` asks for them."""
    if not texts:
        return []
    return list(tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"])
