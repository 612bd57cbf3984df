"""The layouts in which a row can hold a preference or a prompt, recognised from the row itself.

Invariants: the prompt stands under a key of its own (explicit) or is what both sides begin with (implicit), and both sides
are texts (standard) or lists of messages (conversation); a row that is none of these, or that could be two of them, is a
:class:`LayoutError` that says what was expected and quotes no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_ray.rows.conversations import (
    Message,
    dialogue_messages,
    is_conversation,
    is_message,
    plain_messages,
    shape_problem,
    text_problem,
    turn_problem,
    without_nulls,
)
from rlhf_ray.rows.row import LayoutError, is_filled
from rlhf_ray.rows.template_variables import CHAT_TEMPLATE_KWARGS, variables_problem

SYSTEM, TOOLS = "system", "tools"
"""Optional columns: the system message before a conversation, and the functions that the assistant may call."""
EMPTY_ANSWER: Message = {"role": "assistant", "content": ""}


class Keys(NamedTuple):
    """The names of the columns that hold a preference."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"

    @property
    def are_single(self) -> bool:
        """Whether both sides are the same column, which holds the one answer of a row."""
        return self.chosen == self.rejected


class PairParts(NamedTuple):
    """A preference as its row is written: all texts, or all messages; ``prompt`` is empty where the sides hold it."""

    prompt: str | Sequence[Message]
    chosen: str | Sequence[Message]
    rejected: str | Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


def read_pair(
    values: Mapping[str, Any], keys: Keys, *, turns: bool = False, prompt_in_sides: bool | None = None
) -> PairParts:
    """The prompt and the two sides of a row; with ``turns`` texts become messages of the user and the assistant.

    ``prompt_in_sides`` says whether texts beside a prompt begin with it; none: that is told from the row, or refused.
    """
    chosen, rejected = _read_cell(values, keys.chosen), _read_cell(values, keys.rejected)
    prompt = _read_cell(values, keys.prompt) if is_filled(values, keys.prompt) else ""
    if is_conversation(chosen) != is_conversation(rejected):
        kinds = f"{keys.chosen!r} is {_kind(chosen)} and {keys.rejected!r} is {_kind(rejected)}"
        raise LayoutError(f"{kinds}: write both in the same form")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        _refuse_lists_of_turns(keys, (prompt, chosen, rejected))
        if prompt and _texts_hold_prompt(keys, prompt, (chosen, rejected), prompt_in_sides):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not turns:
            refuse_beside_texts(values)
            return PairParts(prompt, chosen, rejected)
        prompt, chosen, rejected = _texts_as_turns(keys, prompt, chosen, rejected)
    return _read_conversation(values, keys, prompt, _as_turns(chosen, "assistant"), _as_turns(rejected, "assistant"))


def read_prompt_messages(values: Mapping[str, Any], key: str) -> list[Message]:
    """The conversation under ``key`` that the assistant is to answer next, after the message of the ``system`` column."""
    prompt = _read_cell(values, key)
    messages = [*_read_system(values, prompt), *as_prompt(prompt)]
    check_answer_follows(key, messages)
    return messages


def read_prompt_text(values: Mapping[str, Any], key: str) -> str:
    """The plain text under ``key`` that is to be gone on with; columns that it has no place for are refused."""
    text = _read_cell(values, key)
    refuse_beside_texts(values)
    return str(text)


def read_answered_messages(values: Mapping[str, Any], key: str, answer_key: str | None = None) -> tuple[Message, ...]:
    """The conversation under ``key`` that ends with an answer of the assistant, after the message of the ``system`` column.

    With ``answer_key`` the answer stands there, as a text or as messages, after the prompt under ``key``.
    """
    if answer_key is None:
        messages = _read_cell(values, key)
        if not is_conversation(messages):
            raise LayoutError(f"{key!r} must hold a list of messages, this is a text")
        parts = [(key, [*_read_system(values, messages), *messages])]
    else:
        prompt, answer = _read_cell(values, key), values.get(answer_key)
        answered = _as_turns(_read_cell(values, answer_key), "assistant") if answer != "" else [EMPTY_ANSWER]
        parts = [(key, [*_read_system(values, prompt), *as_prompt(prompt)]), (answer_key, answered)]
    _check_turns(parts)
    return tuple(message for _, messages in parts for message in messages)


def holds_messages(value: Any) -> bool:
    """Whether a cell holds messages, also where a table wrote them as text."""
    return is_conversation(value) or is_conversation(decoded_cell(value))


def decoded_cell(value: Any) -> Any:
    """A cell as a list of messages where it holds them in another known form; or else the cell itself.

    The forms are one message alone, messages written as JSON, and lists of roles and of contents (``Sequence`` of older
    versions of ``datasets``).
    """
    if isinstance(value, str):
        content = _message_from_json(value)
        return value if content is None else decoded_cell(content)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        messages = [_message_from_json(item) for item in value]
        return messages if all(map(is_message, messages)) else value
    if isinstance(value, Mapping) and {"role", "from"} & value.keys():
        if all(isinstance(field, list) for field in value.values()):
            return [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=False)]
        return [value]
    return value


def _message_from_json(text: str) -> Any:
    """The message, or the list of messages, that a text spells as JSON; none where it spells none."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = content if isinstance(content, list) else [content]
    return content if messages and all(map(is_message, messages)) else None


def as_prompt(cell: str | Sequence[Message]) -> Sequence[Message]:
    """A text as the turns of a dialogue if it is written as one, or else as what the user says."""
    return (dialogue_messages(cell) or _as_turns(cell, "user")) if isinstance(cell, str) else cell


def check_answer_follows(key: str, messages: Sequence[Message]) -> None:
    """Refuse a conversation, named by ``key``, that the assistant cannot answer next."""
    if messages[-1]["role"] == "assistant":
        raise LayoutError(f"{key!r} ends with 'assistant', who is to answer next: leave the last message out")
    _check_turns([(key, messages), ("answer", [{"role": "assistant"}])])  # as if the answer stood there already


def read_tools(values: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The functions that a conversation may call: a list, or a list written as JSON; none where there are none."""
    if not is_filled(values, TOOLS):
        return None
    tools = _tools_from_json(values[TOOLS])
    if isinstance(tools, list):
        tools = [_tools_from_json(tool) for tool in tools]
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise LayoutError(
            f"{TOOLS!r} must hold a list of functions, each a mapping; this is of type {type(tools).__name__}"
        )
    return without_nulls(tools) or None


def read_variables(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The template variables of a row: a mapping, or one written as JSON; none where there are none.

    A table gives every row the variables that any row has: those that are null are none.
    """
    if not is_filled(values, CHAT_TEMPLATE_KWARGS):
        return None
    variables = values[CHAT_TEMPLATE_KWARGS]
    if isinstance(variables, str):
        try:
            variables = json.loads(variables)
        except (ValueError, RecursionError) as error:
            raise LayoutError(f"{CHAT_TEMPLATE_KWARGS!r} must hold a mapping, and this text is not JSON") from error
    if problem := variables_problem(variables):
        raise LayoutError(f"{CHAT_TEMPLATE_KWARGS!r} must hold a mapping{problem}")
    return {name: value for name, value in variables.items() if value is not None} or None


def _tools_from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{TOOLS!r} must hold a list of functions, and this text is not JSON") from error


def _read_conversation(
    values: Mapping[str, Any], keys: Keys, prompt: Any, chosen: Sequence[Message], rejected: Sequence[Message]
) -> PairParts:
    sides_are_whole = _holds_prompt(chosen, prompt) and _holds_prompt(rejected, prompt)
    prompt = () if sides_are_whole else as_prompt(prompt)
    system = _read_system(values, prompt or chosen)
    if prompt:
        prompt = [*system, *prompt]
        _refuse_another_prompt(keys, prompt, chosen)
    else:
        chosen, rejected = [*system, *chosen], [*system, *rejected]
    for key, side in ((keys.chosen, chosen), (keys.rejected, rejected)):
        _check_turns([(keys.prompt, prompt), (key, side)] if prompt else [(key, side)])
    return PairParts(tuple(prompt), tuple(chosen), tuple(rejected), read_tools(values))


def _holds_prompt(side: Sequence[Message], prompt: Any) -> bool:
    """Whether a side is a whole conversation with the prompt in it: as its first messages, or as a text of the user.

    Blanks around a text do not count.
    """
    if is_conversation(prompt):
        same = len(side) > len(prompt) and all(map(_same_message, side, prompt))
        alone = len(prompt) == 1 and prompt[0]["role"] == "user" and isinstance(prompt[0]["content"], str)
        return same or (alone and _holds_prompt(side, prompt[0]["content"]))
    questions = [message["content"].strip() for message in side if message["role"] == "user"]
    return bool(questions) and (not prompt or prompt.strip() in questions)


def _same_message(one: Message, other: Message) -> bool:
    return {**one, "content": one["content"].strip()} == {**other, "content": other["content"].strip()}


def _refuse_another_prompt(keys: Keys, prompt: Sequence[Message], side: Sequence[Message]) -> None:
    """Refuse sides that begin a conversation of their own after a prompt that the assistant should answer."""
    opens = side[0]["role"] in ("system", "developer", "user") and side[-1]["role"] == "assistant"
    if prompt[-1]["role"] == "user" and opens:
        ignored = (
            f"set data.ignore_columns=[{keys.prompt}] to read the two sides as whole conversations, or mend the prompt"
        )
        raise LayoutError(
            f"{keys.prompt!r} is no message of the user in {keys.chosen!r}, which begins a conversation of its own",
            "mend the prompt" if keys.are_single else ignored,
        )


def _refuse_lists_of_turns(keys: Keys, cells: Sequence[str]) -> None:
    """Refuse a row whose prompt and sides are all lists of texts written as JSON, one text a turn."""
    if all(cell.lstrip().startswith("[") for cell in cells) and all(map(_is_list_of_texts, cells)):
        raise LayoutError(
            f"{', '.join(map(repr, dict.fromkeys(keys)))} hold lists of turns written as JSON",
            "write them as lists of messages",
        )


def _is_list_of_texts(text: str) -> bool:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, list) and bool(content) and all(isinstance(turn, str) for turn in content)


def _texts_hold_prompt(keys: Keys, prompt: str, sides: Sequence[str], prompt_in_sides: bool | None) -> bool:
    """Whether texts repeat the prompt that stands beside them; certain only of a dialogue, or where the config says so."""
    repeated = all(side.startswith(prompt) for side in sides)
    if prompt_in_sides and not repeated:
        sides = f"{keys.chosen!r} does" if keys.are_single else "the sides do"
        raise LayoutError(f"{sides} not begin with {keys.prompt!r}, as data.prompt_in_sides=true says")
    if not repeated or prompt_in_sides is not None:
        return bool(prompt_in_sides)
    if dialogue_messages(prompt):
        return True
    if len(prompt.split()) > 1:
        sides = ("both sides begin", "the sides hold", "answers do")
        begin, hold, repeat = (f"{keys.chosen!r} begins", "it holds", "answer does") if keys.are_single else sides
        raise LayoutError(
            f"{begin} with all of {keys.prompt!r}, which would stand there twice",
            f"set data.prompt_in_sides=true if {hold} the prompt, or false if the {repeat} repeat it",
        )
    return False


def _texts_as_turns(keys: Keys, prompt: str, chosen: str, rejected: str) -> tuple[Any, Any, Any]:
    """Texts as turns: the prompt is the user's and the answers are the assistant's, or all are dialogues written as text."""
    if not prompt or dialogue_messages(prompt):
        sides = [dialogue_messages(prompt + side) for side in (chosen, rejected)]
        if not all(sides):
            raise LayoutError(
                f"nothing under {keys.prompt!r} and no dialogue of 'Human:' and 'Assistant:' in the sides, but "
                "data.apply_chat_template makes turns of prompts and answers: name the column of the prompts in "
                "data.prompt_key"
            )
        for key, side in zip(keys[1:], sides, strict=True):
            if problem := shape_problem(side):
                raise LayoutError(f"{key!r}, a dialogue written as text: {problem}")
        return "", sides[0], sides[1]
    return prompt, chosen, rejected


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
        return list(cell)
    return [{"role": role, "content": cell}] if cell else []


def _read_cell(values: Mapping[str, Any], key: str) -> Any:
    """The text or the plain messages under ``key``."""
    value = decoded_cell(values.get(key))
    if is_conversation(value):
        messages = plain_messages(value)
        if problem := shape_problem(messages):
            raise LayoutError(f"{key!r}: {problem}")
        return messages
    if problem := text_problem(value):
        raise LayoutError(f"{key!r} must hold a text or a list of messages{problem}")
    return value


def _kind(cell: Any) -> str:
    return "a conversation" if is_conversation(cell) else "a text"


def refuse_beside_texts(values: Mapping[str, Any]) -> None:
    """Refuse a row of plain texts with columns that only a conversation has a place for."""
    found = {
        SYSTEM: is_filled(values, SYSTEM),
        TOOLS: read_tools(values) is not None,
        CHAT_TEMPLATE_KWARGS: read_variables(values) is not None,
    }
    for key, there in found.items():
        if there:
            raise LayoutError(
                f"there is something under {key!r}, for which a plain text has no place: set data.apply_chat_template=true, or "
                "write the row as messages"
            )
