"""What a chat template leaves out of a conversation, found by looking for the conversation's texts in what it has rendered.

Invariants: a loss is a kind, and quotes no text of the row; each kind is said once for a file, with how many rows have it and
one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

from rlhf_ray.config.files.tokenizers import unread_variable
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat, Conversation, called_names, reasoning_of
from rlhf_ray.data.chat_template import open_thinking
from rlhf_ray.errors import RequestError

BLANKS = "blanks at the ends of messages"
EARLIER_THINKING = "the thinking of earlier answers"
THINKING = "the thinking beside the content of an answer"
CALLS = "calls of tools"
TOOLS = "the tools column"
UNTHOUGHT = "no thinking in an answer"
"""Not a loss of the template: its prompt opens a block of thinking, and the answer has none."""
USUAL = (BLANKS, EARLIER_THINKING)
"""Kinds that templates leave out of prompts on purpose; the policy never meets them either."""
WAYS_OUT: Mapping[str, str] = {
    THINKING: "write it into the content, between the tags that the model uses",
    TOOLS: "choose a model whose template writes tools, or describe them in a message of the system",
    CALLS: "choose a model whose template writes calls, or write them into the content",
    UNTHOUGHT: "the answers are joined as they are; switch the block off (data.template_variables, such as "
    "{enable_thinking: false}), or give the thinking under reasoning_content",
}


def prompt_losses(conversation: Conversation, prompt: str) -> list[str]:
    """What is not in the ``prompt`` that was rendered of a conversation without its answer."""
    losses: list[str] = []
    for message in conversation.messages:
        losses += _content_loss(message, prompt)
        if reasoning_of(message).strip() not in prompt:
            losses.append(EARLIER_THINKING)
        losses += [CALLS] * any(name not in prompt for name in called_names(message.get("tool_calls")))
    losses += [TOOLS] * any(name not in prompt for name in called_names(conversation.tools))
    return list(dict.fromkeys(losses))


def answer_losses(message: Mapping[str, Any], prompt: str, answer: str) -> list[str]:
    """What of the message that is the answer is not in the text of the ``answer`` after ``prompt``."""
    losses = [THINKING] * (reasoning_of(message).strip() not in answer)
    losses += [CALLS] * any(name not in answer for name in called_names(message.get("tool_calls")))
    if str(message.get("content") or "").strip() not in prompt[-len(answer) :] + answer:
        losses.append("the text of an answer that calls tools")
    block = open_thinking(prompt)
    return [*losses, UNTHOUGHT] if block is not None and block.closing not in answer else losses


def report_losses(chat: ChatFormat, name: str, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Log each kind of loss once; ``rows`` are the conversations of a file by their places, with the losses of each.

    Raises :class:`RequestError` for variables that the template does not read.
    """
    if not rows:
        return
    _check_format(chat, name)
    for kind in dict.fromkeys(kind for _, losses in rows for kind in losses):
        places = [where for where, losses in rows if kind in losses]
        what = "opens a block of thinking, but there is" if kind == UNTHOUGHT else "leaves out"
        otherwise = "a policy is never given it either" if kind in USUAL else "write it where the template reads it"
        get_logger("data").log(
            INFO if kind in USUAL else WARNING,
            "%s: the chat template %s %s in %d of %d conversations, such as %s: %s",
            name, what, kind, len(places), len(rows), places[0], WAYS_OUT.get(kind, otherwise),
        )  # fmt: skip


def _check_format(chat: ChatFormat, name: str) -> None:
    if problem := unread_variable(str(chat.tokenizer.chat_template), chat.variables):
        raise RequestError(f"data.template_variables: {problem}")
    if chat.day:
        get_logger("data").warning(
            "%s: the chat template writes the day (%s) into conversations, so a model trained today reads another text "
            "tomorrow: where the template has a variable for it, such as Llama 3's date_string, set it in "
            "data.template_variables", name, chat.day,
        )  # fmt: skip


def _content_loss(message: Mapping[str, Any], prompt: str) -> Iterator[str]:
    content = message.get("content")
    if not isinstance(content, str) or content in prompt or _is_data(message, content):
        return
    if content.strip() in prompt:
        yield BLANKS
    elif message["role"] == "assistant" and content.rpartition("</think>")[2].strip() in prompt:
        yield EARLIER_THINKING
    else:
        yield f"the text of messages of the {message['role']}"


def _is_data(message: Mapping[str, Any], content: str) -> bool:
    """Whether it is a tool's answer in JSON, which templates write in their own way."""
    if message["role"] != "tool":
        return False
    try:
        return isinstance(json.loads(content), dict | list)
    except ValueError:
        return False
