"""Demonstrations: prompts with the answers that a model is to learn, or whole conversations with several.

Invariants: one demonstration a row, in the order of the file. It is two texts, neither of them empty, or a conversation that
ends with an answer of the assistant and has one to learn. What says which answers those are is no part of a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.rows.conversations import Message
from rlhf_ray.rows.layouts import (
    holds_messages,
    read_answered_messages,
    read_tools,
    read_variables,
    refuse_beside_texts,
)
from rlhf_ray.rows.preferences import Messages
from rlhf_ray.rows.read import PlainReader, read_file
from rlhf_ray.rows.row import KeySets, LayoutError, Row
from rlhf_ray.rows.sources import AnySource

TrainOn = Literal["answers", "last_answer", "all"]
"""What is learned: every answer of the assistant, the last one alone, or all tokens."""
WHOLE = ("messages", "conversations", "conversation")
"""Columns that hold a whole conversation."""
FLAGS = ("train", "weight")
"""Fields of a message that say whether it is learned; ``weight`` is that of OpenAI's fine-tuning files, 0 or 1."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to it as texts, or a conversation, in which both are empty."""

    prompt: str
    answer: str
    messages: Messages | None = None
    """The whole conversation, which ends with an answer; none of texts."""
    learned: tuple[int, ...] = ()
    """The places in ``messages`` of the answers to learn."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that the conversation may call."""
    where: str = field(default="", compare=False)
    """File and line."""
    template_variables: Mapping[str, Any] | None = None
    """Variables that the chat template is given for this conversation alone."""

    @property
    def is_conversation(self) -> bool:
        """Whether it is a list of messages."""
        return self.messages is not None

    @property
    def asked(self) -> str | Messages:
        """What the first answer is given to: rows that share it are held out together."""
        if self.messages is None:
            return self.prompt
        first = next(place for place, message in enumerate(self.messages) if message["role"] == "assistant")
        return self.messages[:first]


@dataclass(frozen=True)
class DemonstrationReader(PlainReader):
    """Reads a prompt and an answer under two keys, each as a text or as messages, or a conversation under one of ``WHOLE``.

    With ``turns`` texts become messages of the user and the assistant.
    """

    prompt_key: str = "prompt"
    answer_key: str = "answer"
    turns: bool = False
    train_on: TrainOn = "answers"
    uniform: Sequence[str] = ()

    @property
    def needs(self) -> KeySets:
        """Both keys, or one with a whole conversation."""
        return [(self.prompt_key, self.answer_key), *((key,) for key in WHOLE)]

    def read(self, row: Row) -> Demonstration:
        """The demonstration of one row."""
        keys = (self.prompt_key, self.answer_key)
        whole = [key for key in WHOLE if key in row and key not in keys]
        ways = [" and ".join(map(repr, keys))] * all(key in row for key in keys) + [repr(key) for key in whole]
        if len(ways) > 1:
            raise LayoutError(
                f"holds {', and also '.join(ways)}, so two demonstrations",
                "name the columns that are not to be read in data.ignore_columns",
            )
        if whole:
            return self._conversation(row, read_answered_messages(row.values, whole[0]))
        row.texts([key for key in keys if key not in row])  # which says what is missing
        if self.turns or any(holds_messages(row.values[key]) for key in keys):
            return self._conversation(row, read_answered_messages(row.values, *keys))
        prompt, answer = row.texts(keys)
        refuse_beside_texts(row.values)
        return Demonstration(prompt, answer, where=row.where)

    def _conversation(self, row: Row, messages: Sequence[Message]) -> Demonstration:
        learned = learned_messages(messages, self.train_on)
        bare = tuple({name: value for name, value in each.items() if name not in FLAGS} for each in messages)
        return Demonstration("", "", bare, learned, read_tools(row.values), row.where, read_variables(row.values))


def learned_messages(messages: Sequence[Message], train_on: TrainOn) -> tuple[int, ...]:
    """The places of the answers to learn: those of the assistant that no field of their own takes out."""
    learned = []
    for place, message in enumerate(messages):
        chosen = _flag(place + 1, message, train_on)
        if message["role"] == "assistant" and chosen:
            learned.append(place)
    last = len(messages) - 1
    if train_on == "last_answer":
        learned = [place for place in learned if place == last]
    if not learned:
        which = "the last answer is marked" if train_on == "last_answer" else "all answers are marked"
        raise LayoutError(f"{which} as not to be learned, so there is nothing to learn", "leave the row out")
    return tuple(learned)


def _flag(number: int, message: Message, train_on: TrainOn) -> bool:
    """Whether the fields of a message let it be learned, where it is an answer."""
    flags = {name: message[name] for name in FLAGS if name in message}
    for name, value in flags.items():
        if value not in (0, 1):
            raise LayoutError(
                f"message {number} has {name!r} of type {type(value).__name__}: write true or false, or 1 or 0"
            )
        if value and message["role"] != "assistant":
            raise LayoutError(
                f"message {number} is of {message['role']!r} and marked to be learned ({name!r}), but only answers of the "
                "assistant are",
                "remove the mark; data.train_on=all learns every token",
            )
        if train_on == "all" and not value and message["role"] == "assistant":
            raise LayoutError(
                f"message {number} is marked as not to be learned ({name!r}), but data.train_on=all learns every token",
                "remove the mark, or set data.train_on to answers",
            )
    return all(flags.values())


def read_demonstrations(
    source: AnySource,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    *,
    turns: bool = False,
    train_on: TrainOn = "answers",
    max_rows: int | None = None,
) -> list[Demonstration]:
    """Every demonstration of a data file or data set, as :class:`DemonstrationReader` reads it."""
    return list(read_file(source, DemonstrationReader(prompt_key, answer_key, turns, train_on), max_rows=max_rows))
