"""Conversations as token ids, in the one form that training, evaluation, scoring, serving and PPO share.

Invariants:

- A conversation that ends with an answer is three things in a row: the ids of what comes before the answer, rendered with the
  template's generation prompt, which is what a policy samples after; the ids of the answer's own text; one end token. The
  score is read at the end token. Nothing that the template writes after it, or puts before a finished answer, has a place.
- The text of an answer is its ``content``, letter for letter. Only what has no text of its own, a call of a tool or thinking
  in a field beside the content, is taken from the template's rendering.
- No special token is added that the template did not write; a tokenizer without a template, or a template that refuses the
  conversation, is an error that names the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, partial
from typing import Any, NamedTuple

from rlhf_ray.data.answer_ids import Ids, join_answers, tokenize, with_one_end
from rlhf_ray.data.chat_template import (
    Ending,
    Messages,
    Tools,
    Variables,
    depends_on_day,
    find_ending,
    open_thinking,
    render,
    shared_head,
)

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold its thinking; templates read one of them."""


class Conversation(NamedTuple):
    """Messages whose last one is the answer, or which the assistant is to answer next."""

    messages: Messages
    tools: Tools | None = None
    """Functions that the assistant may call."""
    variables: Variables | None = None
    """Template variables of this conversation alone; they win over those of the format."""
    where: str = ""
    """The place of its row, for errors."""


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become ids: a tokenizer with its chat template, and the variables that the template is given."""

    tokenizer: Any
    variables: Variables = field(default_factory=dict)
    """Such as ``enable_thinking``; passed to the template as they are."""

    @property
    def end_token_id(self) -> int:
        """The token that ends an answer, and at which its score is read."""
        return self.ending.token_id

    @cached_property
    def ending(self) -> Ending:
        """How the template ends an answer; :class:`DataError` for a template that leaves out what is said."""
        return find_ending(self.tokenizer, self.variables)

    @cached_property
    def day(self) -> str:
        """Today, where the template writes the day into what it renders; else empty."""
        return date.today().isoformat() if depends_on_day(self.tokenizer, self.variables) else ""

    def prompt_text(self, conversation: Conversation) -> str:
        """What a policy is given to go on with: all messages, and the template's generation prompt."""
        return self._render(conversation, answer_follows=True)

    def prompt_ids(self, messages: Messages, tools: Tools | None = None, variables: Variables | None = None) -> Ids:
        """The ids of :meth:`prompt_text`."""
        return self.encode_prompts([self.prompt_text(Conversation(messages, tools, variables))])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of prompts that the template has written."""
        return tokenize(self.tokenizer, texts)

    def encode(
        self,
        messages: Messages,
        tools: Tools | None = None,
        variables: Variables | None = None,
        *,
        finished: bool = True,
        where: str = "",
    ) -> tuple[Ids, Ids]:
        """Ids of what comes before the last answer, and of that answer.

        An answer that is not ``finished`` was cut by a limit: it has no end token.
        """
        conversation = Conversation(messages, tools, variables, where)
        prompt = self.prompt_text(conversation._replace(messages=messages[:-1]))
        ((prompt_ids, (answer,)),) = self.encode_answers([prompt], [[self.answer_text(conversation, prompt)]])
        return prompt_ids, answer if finished else answer[:-1]

    def rendering_ids(
        self, messages: Messages, tools: Tools | None = None, variables: Variables | None = None, *, where: str = ""
    ) -> Ids:
        """The ids of all that the template writes for a conversation that ends with an answer.

        Nothing is trained on them: programs elsewhere read reward models at the last one.
        """
        text = self._render(Conversation(messages, tools, variables, where), answer_follows=False)
        return tokenize(self.tokenizer, [text])[0]

    def encode_answers(self, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[tuple[Ids, list[Ids]]]:
        """For each prompt that the template has written its ids, and those of the answers after it with their end token."""
        rows = join_answers(self.tokenizer, partial(tokenize, self.tokenizer), prompts, answers)
        return [(prompt, [with_one_end(answer, self.end_token_id) for answer in several]) for prompt, several in rows]

    def answer_text(self, conversation: Conversation, prompt: str) -> str:
        """The text of the last message as a policy would write it after ``prompt``, without the end token."""
        message = conversation.messages[-1]
        thinking = reasoning_of(message)
        text = self._rendered_thinking(conversation, prompt, thinking) if thinking else None
        if text is None:
            bare = _with_reasoning(conversation, {})
            calls = message.get("tool_calls")
            text = self._rendered_answer(bare, prompt, keep_head=False) if calls else message.get("content") or ""
            if thinking and self.writes_think_tags(prompt):
                text = f"<think>\n{thinking}\n</think>\n\n{text}"
        return _without_second_opening(prompt, text)

    def writes_think_tags(self, prompt: str) -> bool:
        """Whether the template, or a prompt that it has written, marks thinking with ``<think>``."""
        return "<think>" in prompt or "<think>" in str(self.tokenizer.chat_template)

    def _rendered_thinking(self, conversation: Conversation, prompt: str, thinking: str) -> str | None:
        """Thinking and content as the template writes them after ``prompt``; none where it drops one of them."""
        content = conversation.messages[-1].get("content") or ""
        for name in REASONING_FIELDS:  # templates read one of them, whichever the row has
            renamed = _with_reasoning(conversation, {name: thinking})
            text = self._rendered_answer(renamed, prompt, keep_head=True, after_all=True)
            if thinking.strip() in text and content.strip() in text:
                return text
        return None

    def _rendered_answer(
        self, conversation: Conversation, prompt: str, *, keep_head: bool, after_all: bool = False
    ) -> str:
        """What the template writes for the last message, from where it parts from ``prompt`` to its end token.

        With ``after_all`` nothing, where it parts from the prompt before its end.
        """
        whole = self._render(conversation, answer_follows=False)
        shared = len(shared_head(prompt, whole))
        if after_all and prompt[shared:].strip():
            return ""
        text = whole[shared:]
        text = self.ending.cut(text, _end_of_texts(conversation.messages[-1], text))
        return text if keep_head else text.removeprefix(self.ending.head)

    def _render(self, conversation: Conversation, *, answer_follows: bool) -> str:
        variables = {**self.variables, **(conversation.variables or {})}
        return render(
            self.tokenizer,
            conversation.messages,
            tools=conversation.tools,
            variables=variables,
            answer_follows=answer_follows,
            where=conversation.where,
        )


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The thinking that a message holds in a field beside its content; empty where there is none."""
    return next((str(message[name]) for name in REASONING_FIELDS if message.get(name)), "")


def called_names(functions: Any) -> list[str]:
    """The names of functions, or of calls of them."""
    bodies = [each.get("function", each) for each in functions or () if isinstance(each, Mapping)]
    return [str(each["name"]) for each in bodies if isinstance(each, Mapping) and each.get("name")]


def _end_of_texts(message: Mapping[str, Any], text: str) -> int:
    """Behind how many letters of a rendered ``text`` all texts of its message stand."""
    texts = [str(message.get("content") or ""), reasoning_of(message), *called_names(message.get("tool_calls"))]
    places = [(text.rfind(one.strip()), len(one.strip())) for one in texts if one.strip()]
    return max((place + length for place, length in places if place >= 0), default=0)


def _with_reasoning(conversation: Conversation, reasoning: Mapping[str, str]) -> Conversation:
    """The conversation with this ``reasoning`` in its last message, in place of its own."""
    *before, last = conversation.messages
    bare = {name: value for name, value in last.items() if name not in REASONING_FIELDS}
    return conversation._replace(messages=[*before, {**bare, **reasoning}])


def _without_second_opening(prompt: str, answer: str) -> str:
    """The answer without the tag that opens its thinking, where the prompt has opened it already."""
    block = open_thinking(prompt)
    if block is None or not answer.startswith(block.opening):
        return answer
    return answer.removeprefix(block.opening).removeprefix(block.blanks)
