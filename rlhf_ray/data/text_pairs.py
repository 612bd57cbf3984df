"""What an encoder reads: a prompt and a response as a pair of texts.

Invariants: the token ids are those that the tokenizer makes of the two texts (``tokenizer(prompt, response)``), or of what its
chat template writes if it has one. An item that is cut keeps its first token, at which an encoder is read, and its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_ray.data.encode import EMPTY, EQUAL, TOO_LONG
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.rows.preferences import PreferencePair

BETWEEN_TURNS = "\n\n"
"""What stands between the turns of a conversation in the first of the two texts."""

Ids = list[int]
Messages = Sequence[Mapping[str, Any]]


def pair_ids(tokenizer: Any, prompt: str, response: str) -> Ids:
    """Ids of a prompt and its response, with all special tokens."""
    return list(tokenizer(prompt, response)["input_ids"])


def conversation_ids(tokenizer: Any, messages: Messages, **variables: Any) -> Ids:
    """Ids of a conversation that ends with a message of the assistant.

    The chat template writes it if there is one, with ``variables``. Otherwise the last message is the response, and the texts
    of all before it are the prompt, with an empty line between each two.
    """
    if tokenizer.chat_template is not None:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, return_dict=False, **variables
        )
        return list(rendered)
    *before, answer = (message.get("content") or "" for message in messages)
    return pair_ids(tokenizer, BETWEEN_TURNS.join(before), answer)


def cut_to(token_ids: Ids, max_tokens: int) -> Ids:
    """The first token, and as much of the end as fits."""
    return [*token_ids[:1], *token_ids[len(token_ids) - max_tokens + 1 :]] if len(token_ids) > max_tokens else token_ids


def encode_text_pairs(tokenizer: Any, rows: Iterable[PreferencePair], max_tokens: int) -> list[PairExample | str]:
    """Both sides of every row, or the reason why it is dropped."""
    return [_encode_row(tokenizer, row, max_tokens) for row in rows]


def _encode_row(tokenizer: Any, row: PreferencePair, max_tokens: int) -> PairExample | str:
    chosen, rejected = (_side(tokenizer, row, answer) for answer in (row.chosen, row.rejected))
    if chosen == rejected:
        return EQUAL
    if not chosen or not rejected:
        return EMPTY
    if max(len(chosen), len(rejected)) > max_tokens:
        return TOO_LONG
    start = list(tokenizer(row.prompt)["input_ids"]) if isinstance(row.prompt, str) else []
    begins = start == chosen[: len(start)] == rejected[: len(start)]
    return PairExample(chosen, rejected, row.margin, row.grade, row.source, len(start) if begins else 0)


def _side(tokenizer: Any, row: PreferencePair, answer: str | Messages) -> Ids:
    if isinstance(answer, str):
        prompt = row.prompt
        assert isinstance(prompt, str), "prompt and answers are all texts or all lists of messages"
        if tokenizer.chat_template is None:
            return pair_ids(tokenizer, prompt, answer)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return conversation_ids(tokenizer, turns)
    assert not isinstance(row.prompt, str), "prompt and answers are all texts or all lists of messages"
    return conversation_ids(tokenizer, [*row.prompt, *answer], tools=row.tools)
