"""The layouts in which a row can hold a preference or a prompt, recognised from the row itself.

Invariants: the prompt stands under a key of its own (explicit) or is what both sides begin with (implicit), and both sides
are texts (standard) or lists of messages (conversation); a row that is none of these is a :class:`LayoutError` that
says what was expected and quotes no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ray.rows.conversations import (
    Message,
    is_conversation,
    plain_messages,
    shape_problem,
    text_problem,
    turn_problem,
)
from rlhf_ray.rows.row import LayoutError, is_filled

SYSTEM, TOOLS = "system", "tools"
"""Optional columns: the system message before a conversation, and the functions that the assistant may call."""


class Keys(NamedTuple):
    """The names of the columns that hold a preference."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


class PairParts(NamedTuple):
    """A preference as its row is written: all texts, or all messages; ``prompt`` is empty where the sides hold it."""

    prompt: str | Sequence[Message]
    chosen: str | Sequence[Message]
    rejected: str | Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


def read_pair(values: Mapping[str, Any], keys: Keys, *, turns: bool = False) -> PairParts:
    """The prompt and the two sides of a row; with ``turns`` texts become messages of the user and the assistant."""
    chosen, rejected = _read_cell(values, keys.chosen), _read_cell(values, keys.rejected)
    prompt = _read_cell(values, keys.prompt) if is_filled(values, keys.prompt) else ""
    if is_conversation(chosen) != is_conversation(rejected):
        kinds = f"{keys.chosen!r} is {_kind(chosen)} and {keys.rejected!r} is {_kind(rejected)}"
        raise LayoutError(f"{kinds}: write both in the same form")
    if isinstance(chosen, str) and isinstance(prompt, str):
        if not turns:
            _refuse_beside_texts(values)
            return PairParts(prompt, chosen, rejected)
        if not prompt:
            raise LayoutError(
                f"nothing under {keys.prompt!r}, but data.apply_chat_template makes turns of prompts and answers: name the "
                "column of the prompts in data.prompt_key"
            )
    return _read_conversation(values, keys, prompt, _as_turns(chosen, "assistant"), _as_turns(rejected, "assistant"))


def read_prompt_messages(values: Mapping[str, Any], key: str) -> list[Message]:
    """The conversation under ``key`` that the assistant is to answer next, after the message of the ``system`` column."""
    prompt = _read_cell(values, key)
    messages = [*_read_system(values, prompt), *_as_turns(prompt, "user")]
    check_answer_follows(key, messages)
    return messages


def check_answer_follows(key: str, messages: Sequence[Message]) -> None:
    """Refuse a conversation, named by ``key``, that the assistant cannot answer next."""
    if messages[-1]["role"] == "assistant":
        raise LayoutError(f"{key!r} ends with 'assistant', who is to answer next: leave the last message out")
    _check_turns([(key, messages), ("answer", [{"role": "assistant"}])])  # as if the answer stood there already


def read_tools(values: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The functions that a conversation may call: a list, or a list written as JSON; none where there are none."""
    if not is_filled(values, TOOLS):
        return None
    tools = values[TOOLS]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise LayoutError(f"{TOOLS!r} must hold a list of functions, and this text is not JSON") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise LayoutError(
            f"{TOOLS!r} must hold a list of functions, each a mapping; this is of type {type(tools).__name__}"
        )
    return tools or None


def _read_conversation(
    values: Mapping[str, Any], keys: Keys, prompt: Any, chosen: Sequence[Message], rejected: Sequence[Message]
) -> PairParts:
    sides_are_whole = _holds_prompt(chosen, prompt) and _holds_prompt(rejected, prompt)
    prompt = () if sides_are_whole else _as_turns(prompt, "user")
    system = _read_system(values, prompt or chosen)
    if prompt:
        prompt = [*system, *prompt]
    else:
        chosen, rejected = [*system, *chosen], [*system, *rejected]
    for key, side in ((keys.chosen, chosen), (keys.rejected, rejected)):
        _check_turns([(keys.prompt, prompt), (key, side)] if prompt else [(key, side)])
    return PairParts(tuple(prompt), tuple(chosen), tuple(rejected), read_tools(values))


def _holds_prompt(side: Sequence[Message], prompt: Any) -> bool:
    """Whether a side is a whole conversation with the prompt in it: as its first messages, or as a text of the user."""
    if isinstance(prompt, str):
        questions = [message.get("content") for message in side if message["role"] == "user"]
        return bool(questions) and (not prompt or prompt in questions)
    return list(side[: len(prompt)]) == plain_messages(prompt)


def _check_turns(parts: Sequence[tuple[str, Sequence[Message]]]) -> None:
    problem = turn_problem(parts)
    if problem:
        raise LayoutError(problem)


def _read_system(values: Mapping[str, Any], first: Any) -> list[Message]:
    """The message of the ``system`` column, if any; refused where ``first``, which follows it, begins with one already."""
    if not is_filled(values, SYSTEM):
        return []
    if problem := text_problem(values[SYSTEM]):
        raise LayoutError(f"{SYSTEM!r} must hold a text{problem}")
    if is_conversation(first) and first and first[0]["role"] == SYSTEM:
        raise LayoutError(
            f"{SYSTEM!r} holds a text, but the conversation begins with a message of the system: keep one"
        )
    return [{"role": SYSTEM, "content": values[SYSTEM]}]


def _as_turns(cell: Any, role: str) -> list[Message]:
    """The messages of a cell; a text is one message of ``role``."""
    if is_conversation(cell):
        return plain_messages(cell)
    return [{"role": role, "content": cell}] if cell else []


def _read_cell(values: Mapping[str, Any], key: str) -> Any:
    """The text or the messages under ``key``."""
    value = values.get(key)
    if is_conversation(value):
        if problem := shape_problem(value):
            raise LayoutError(f"{key!r}: {problem}")
    elif problem := text_problem(value):
        raise LayoutError(f"{key!r} must hold a text or a list of messages{problem}")
    return value


def _kind(cell: Any) -> str:
    return "a conversation" if is_conversation(cell) else "a text"


def _refuse_beside_texts(values: Mapping[str, Any]) -> None:
    for key in (SYSTEM, TOOLS):
        if is_filled(values, key):
            raise LayoutError(
                f"there is something under {key!r}, for which a plain text has no place: set data.apply_chat_template=true, or "
                "write the row as messages"
            )
