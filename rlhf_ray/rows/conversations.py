"""Conversations: what a message must hold, and in which order the roles may speak.

Invariants: a conversation begins with the system (or developer) or the user; user and assistant take turns; a tool speaks
only to answer a call of the assistant. A problem names the number of the message and what was expected, and quotes no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
START = ""
"""The role before the first message."""
AFTER: Mapping[str, tuple[str, ...]] = {
    START: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant"),
}
"""Who may speak after whom; only a tool may speak after an assistant that calls tools."""
MAY_BE_SILENT = ("system", "developer", "tool")
"""Roles whose message may be an empty text."""
Message = Mapping[str, Any]


def is_conversation(value: Any) -> bool:
    """Whether a cell holds a list of messages, well-formed or not, and not a text."""
    return isinstance(value, list)


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages without their null fields: a table gives every message all fields that any of them has."""
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def shape_problem(messages: Any) -> str:
    """What is wrong with the form of one list of messages; empty where nothing is."""
    if not messages:
        return "holds no message, at least one was expected"
    for number, message in enumerate(messages, 1):
        problem = _message_problem(message)
        if problem:
            return f"message {number} {problem}"
    return ""


def _message_problem(message: Any) -> str:
    if not isinstance(message, dict):
        return f"must be a mapping with 'role' and 'content', this is a {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if role is None:
        return f"has no 'role'; its keys are {', '.join(map(repr, message))}"
    if role not in ROLES:
        return f"has no role that is known: {', '.join(ROLES[:-1])} or {ROLES[-1]} was expected"
    if (content is None and message.get("tool_calls")) or (content == "" and role in MAY_BE_SILENT):
        return ""
    return f"must hold a text under 'content'{problem}" if (problem := text_problem(content)) else ""


def turn_problem(parts: Sequence[tuple[str, Sequence[Message]]]) -> str:
    """What is out of order in a conversation that must end with an answer of the assistant; empty where nothing is.

    ``parts`` are the keys under which its messages stand, one after the other, with the messages under each.
    """
    before, calls = START, False
    for key, messages in parts:
        for number, message in enumerate(messages, 1):
            role = message["role"]
            expected = ("tool",) if calls else AFTER[before]
            if role not in expected:
                wanted = " or ".join(map(repr, expected))
                after = f"after {before!r}" if before else "at the start"
                return f"message {number} of {key!r} is of {role!r}, but {wanted} was expected {after}"
            before, calls = role, bool(message.get("tool_calls"))
    if before == "assistant":
        return ""
    return f"{parts[-1][0]!r} ends with {before!r}, but 'assistant' was expected to answer"


def text_problem(value: Any) -> str:
    """Why ``value`` cannot be tokenized as text; empty if it can. It continues the words "must hold a text"."""
    if isinstance(value, list):
        return ", this is a list: write it as one text"
    if not isinstance(value, str):
        return ", this is empty" if value is None else f", this is of type {type(value).__name__}"
    if not value:
        return ", this is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f", this has half a surrogate pair at character {error.start + 1}"
    return ""
