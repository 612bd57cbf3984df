"""Conversations: how a message may be written, what it must hold, and in which order the roles may speak.

Invariants: a conversation begins with the system (or developer) or the user; user and assistant take turns; a tool speaks
only to answer a call of the assistant. A message written in another known way (``from`` and ``value``, parts of text, other
names of roles, fields that a table left empty) becomes the same message under ``role`` and ``content``. A problem names the
number of the message and what was expected, and quotes no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES: Mapping[str, str] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""Names of roles in data of others (ShareGPT, OpenAssistant, Gemini) that can mean one role only."""
OTHER_TOOLS = ("function", "function_call", "observation")
"""Roles of older tool data, whose calls are not under ``tool_calls``."""
OTHER_PARTS = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file")
"""Kinds of parts of a content that are no texts, which a message may name."""
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
TURN = re.compile(r"\n\n(Human|Assistant):")
"""What begins a turn of a dialogue written as one text, as in Anthropic's HH data (hh-rlhf)."""
PYTHON_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:")
"""How messages begin that were written as Python writes them, as ``to_csv`` of ``datasets`` and pandas do."""
Message = Mapping[str, Any]


def is_conversation(value: Any) -> bool:
    """Whether a cell holds a list of messages, well-formed or not, and not a text."""
    return isinstance(value, list)


def is_message(value: Any) -> bool:
    """Whether a value is a mapping with the fields of a message, under either pair of names."""
    return isinstance(value, Mapping) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def plain_messages(messages: Sequence[Any]) -> list[Any]:
    """Messages in one form: ``role`` and ``content``, known names of roles, text parts joined by a line break, no empty fields.

    An assistant that calls tools and says nothing has an empty text as its content, which most templates can write. What is
    in none of the known forms stays as it is, for :func:`shape_problem` to find.
    """
    return [_plain_message(message) if isinstance(message, Mapping) else message for message in messages]


def without_nulls(value: Any) -> Any:
    """A value without the null fields of its mappings, at any depth: a table gives each row the fields of all."""
    if isinstance(value, Mapping):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def dialogue_messages(text: str) -> list[Message]:
    """The turns of a dialogue written as one text, from ``Human:`` on; empty where ``text`` is none.

    A last turn of the assistant without words is where the answer is to follow, and is left out.
    """
    opening, *turns = TURN.split("\n\n" + text.lstrip())
    if opening or not turns or turns[0] != "Human":
        return []
    roles = ["user" if speaker == "Human" else "assistant" for speaker in turns[0::2]]
    messages: list[Message] = [
        {"role": role, "content": words.strip()} for role, words in zip(roles, turns[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        del messages[-1]
    return messages


def shape_problem(messages: Any) -> str:
    """What is wrong with the form of one list of plain messages; empty where nothing is."""
    if not messages:
        return "holds no message, at least one was expected"
    for number, message in enumerate(messages, 1):
        problem = _message_problem(message)
        if problem:
            return f"message {number} {problem}"
    return ""


def _plain_message(message: Message) -> Message:
    fields = dict(without_nulls(message))
    if "from" in fields and "value" in fields and not {"role", "content"} & fields.keys():
        fields = {"role": fields.pop("from"), "content": fields.pop("value"), **fields}
    role = fields.get("role")
    if isinstance(role, str) and role not in ROLES:
        name = role.strip().lower()
        fields["role"] = OTHER_NAMES.get(name, name if name in ROLES else role)
    content = fields.get("content")
    if is_conversation(content) and content and all(_is_text_part(part) for part in content):
        fields["content"] = "\n".join(part["text"] for part in content)
    if fields.get("tool_calls") and "content" not in fields:
        fields["content"] = ""
    return fields


def parts_problem(content: Sequence[Any]) -> str:
    """What a content of several parts holds that is no text, in words that continue "this is"."""
    kinds = [part.get("type") for part in content if isinstance(part, Mapping)]
    known = next((f" of the kind {kind!r}" for kind in kinds if kind in OTHER_PARTS), " that are no texts")
    return f"a list with parts{known}: only parts of text are read"


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _message_problem(message: Any) -> str:
    if not isinstance(message, dict):
        return f"must be a mapping with 'role' and 'content', this is a {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if role is None:
        return f"has no 'role'; its keys are {', '.join(map(repr, message))}"
    if role in OTHER_TOOLS:
        return (
            f"is of {role!r}: write calls as 'tool_calls' of an assistant's message, and results as messages of 'tool'"
        )
    if role not in ROLES:
        return f"has no role that is known: {', '.join(ROLES[:-1])} or {ROLES[-1]} was expected"
    if content == "" and (role in MAY_BE_SILENT or message.get("tool_calls")):
        return ""
    if isinstance(content, list):
        return f"must hold a text under 'content', this is {parts_problem(content)}"
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
    if PYTHON_MESSAGES.match(value):
        return ", these are messages as Python writes them: write them as JSON (json.dumps), or the rows as JSON lines"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f", this has half a surrogate pair at character {error.start + 1}"
    return ""
