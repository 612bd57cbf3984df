"""What an encoder reads: a prompt and a response as a pair of texts.

Invariants: the token ids are those that the tokenizer makes of the two texts (``tokenizer(prompt, response)``), or of what its
chat template writes if it has one. An item that is cut keeps its first token, at which an encoder is read, and its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf_ray.data.answer_ids import Ids, tokenize
from rlhf_ray.data.chat import Conversation
from rlhf_ray.data.chat_template import Messages, render
from rlhf_ray.data.encode import EMPTY, EQUAL, TOO_LONG
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.errors import DataError
from rlhf_ray.rows.preferences import PreferencePair

BETWEEN_TURNS = "\n\n"
"""What stands between the turns of a conversation in the first of the two texts."""


def pair_ids(tokenizer: Any, prompt: str, response: str) -> Ids:
    """Ids of a prompt and its response, with all special tokens."""
    return list(tokenizer(prompt, response)["input_ids"])


def conversation_ids(tokenizer: Any, conversation: Conversation) -> Ids:
    """Ids of a conversation that ends with a message of the assistant.

    The chat template writes it if there is one. Otherwise the last message is the response, and the texts of all before it are
    the prompt, with an empty line between each two; :class:`DataError` for a conversation that is more than its texts.
    """
    messages, tools, variables, where = conversation
    if tokenizer.chat_template is not None:
        (ids,) = tokenize(tokenizer, [render(tokenizer, messages, tools=tools, variables=variables, where=where)])
        return ids
    if tools or variables or any(message.get("tool_calls") for message in messages):
        place = f"{where}: " if where else ""
        raise DataError(
            f"{place}the conversation has tools, calls of them or template variables, which an encoder without a chat template "
            "does not read: leave them out, or write them into the texts"
        )
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
        return conversation_ids(tokenizer, Conversation(turns, where=row.where))
    assert not isinstance(row.prompt, str), "prompt and answers are all texts or all lists of messages"
    messages = [*row.prompt, *answer]
    return conversation_ids(tokenizer, Conversation(messages, row.tools, row.template_variables, row.where))
