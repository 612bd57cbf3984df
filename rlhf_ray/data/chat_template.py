"""What a chat template does, found by rendering it: how it ends an answer, whether it opens a block of thinking.

Invariants: everything is found in what the template writes, and nothing is known by the name of a model; a template that
leaves out what is said is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product, takewhile
from typing import Any, NamedTuple

from rlhf_ray.config.files.tokenizers import NO_TEMPLATE
from rlhf_ray.data.answer_ids import shared_length
from rlhf_ray.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Variables = Mapping[str, Any]

QUESTION, ANSWERS = "Which one?", ("Take this a", "Take this b")
"""Of the conversations that a template is tried with."""
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}
"""Given to templates that render nothing without tools."""
OPENING = re.compile(
    r"(<[\w:|]*(?:think|thought|reason)[\w:|]*>|\[THINK\]|<\|open\|>think<\|sep\|>)(\s*)\Z", re.IGNORECASE
)
"""A tag that opens thinking, at the end of a prompt."""
LONGEST_TAG = 40
"""Characters."""


class RefusedConversation(DataError):
    """A chat template refuses one conversation; others it may write."""


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    tools: Tools | None = None,
    variables: Variables | None = None,
    answer_follows: bool = False,
    where: str = "",
) -> str:
    """The text of a conversation; with ``answer_follows`` it ends where the assistant begins to answer.

    ``where`` is the place of the row, for the :class:`DataError` that is raised where there is no such text.
    """
    place = f"{where}: " if where else ""
    if tokenizer.chat_template is None:
        raise DataError(f"{place}{NO_TEMPLATE}")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            tokenize=False,
            add_generation_prompt=answer_follows,
            **(variables or {}),
        )
    except Exception as error:  # a template is a program, and may refuse a conversation with any error
        raise RefusedConversation(
            f"{place}the tokenizer's chat template refuses the conversation: {error} (variables that it needs are given in "
            "data.template_variables)"
        ) from error
    return str(text)


@dataclass(frozen=True)
class Ending:
    """How a template ends an answer."""

    token_id: int
    token: str
    tail: str
    """All that it writes after an answer, the token included; empty where it writes nothing."""
    head: str
    """What it puts between its generation prompt and an answer that is finished, such as an empty block of thinking."""
    special: frozenset[str]
    """The tokenizer's special tokens."""

    def cut(self, text: str, after: int = 0) -> str:
        """A rendered answer without what ends it; what ends it stands behind the first ``after`` letters."""
        before, token, _ = self.tail.partition(self.token)
        end = text.find(self.token, after)
        if token and end >= 0:
            return text[:end].removesuffix(before)
        other = next((token for token in self.special if text[after:].rstrip().endswith(token)), None)
        if token and other is not None:  # a call of a tool ends with a token of its own in some templates
            return text[: text.rindex(other)]
        return text.removesuffix(self.tail)


def find_ending(tokenizer: Any, variables: Variables) -> Ending:
    """How the template ends an answer.

    Two answers that differ in their last letter are rendered; the common end of both is what the template writes after an
    answer. The end token is the added token in it. Of several, those count that also follow an answer before a next turn.
    Of several that follow each other without a blank it is the tokenizer's end of sequence, or else the last; what comes
    after a blank belongs to no answer. A template that writes no such token gets the tokenizer's end of sequence.
    """
    prompt, one, other, followed = _try_out(tokenizer, variables)
    if QUESTION not in prompt or ANSWERS[0] not in one:
        lost = "of the user" if QUESTION not in prompt else "of the assistant"
        raise DataError(
            f"the tokenizer's chat template leaves out the text of a message {lost}, so nothing can be trained or scored with "
            "it: it may take content only as a list of parts; put a chat_template.jinja that writes plain texts beside its "
            "tokenizer.json"
        )
    tail = one[len(one) - shared_length(one[::-1], other[::-1]) :]
    answer = one.rindex(ANSWERS[0])
    head = one[len(shared_head(prompt, one[:answer])) : answer]
    before_next = followed.partition(ANSWERS[0])[2]
    tokens = _tokens_in(tokenizer, tail[: shared_length(tail, before_next)]) or _tokens_in(tokenizer, tail)
    eos = tokenizer.eos_token
    if not tokens and eos is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token and its chat template writes none after an answer, so no answer could "
            "end: give it an eos_token"
        )
    token = eos if eos in tokens or not tokens else tokens[-1]
    special = frozenset(_special_tokens(tokenizer))
    return Ending(int(tokenizer.convert_tokens_to_ids(token)), str(token), tail, head, special)


def shared_head(prompt: str, whole: str) -> str:
    """What a rendered conversation begins with, in common with the prompt of its answer, and no part of a tag."""
    if whole.startswith(prompt):
        return prompt
    common = prompt[: shared_length(prompt, whole)]
    for opening, closing in ("<>", "[]"):
        start = common.rfind(opening, max(0, len(common) - LONGEST_TAG))
        if start > common.rfind(closing):
            common = common[:start]
    return common


class Thinking(NamedTuple):
    """A block of thinking that a prompt has opened and not closed."""

    opening: str
    closing: str
    blanks: str
    """What the prompt writes after the opening tag."""


def open_thinking(prompt: str) -> Thinking | None:
    """The block of thinking that a prompt leaves open; none where it opens none."""
    match = OPENING.search(prompt)
    if match is None or re.search(r"end|close|/", match[1], re.IGNORECASE):
        return None
    opening, blanks = match.groups()
    closing = opening.replace("START", "END").replace("open", "close").replace("begin", "end")
    if closing == opening:
        closing = f"{opening[0]}/{opening[1:]}"
    return Thinking(opening, closing, blanks)


def depends_on_day(tokenizer: Any, variables: Variables) -> bool:
    """Whether the template writes the day into what it renders, with or without a message of the system, or tools."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    question, system = {"role": "user", "content": QUESTION}, {"role": "system", "content": QUESTION}
    for messages, tools in product(([question], [system, question]), (None, [TOOL])):
        on_days = [{"strftime_now": day.strftime, **variables} for day in (datetime(2001, 2, 3), datetime(2004, 5, 6))]
        try:
            texts = [render(tokenizer, messages, tools=tools, variables=each, answer_follows=True) for each in on_days]
        except DataError:  # a template may refuse a system message, or need tools
            continue
        if texts[0] != texts[1]:
            return True
    return False


def _try_out(tokenizer: Any, variables: Variables) -> tuple[str, str, str, str]:
    """The prompt of a short conversation, the whole of it with each of two answers, and the first followed by a next turn.

    The last is empty where the template refuses it.
    """
    question = {"role": "user", "content": QUESTION}
    one, other = ([question, {"role": "assistant", "content": answer}] for answer in ANSWERS)

    def write(messages: Messages, tools: Tools | None, *, answer_follows: bool = False) -> str:
        return render(tokenizer, messages, tools=tools, variables=variables, answer_follows=answer_follows)

    tools: Tools | None = None
    try:
        prompt = write([question], tools, answer_follows=True)
    except DataError:
        tools = [TOOL]
        prompt = write([question], tools, answer_follows=True)
    try:
        followed = write([*one, question], tools)
    except DataError:
        followed = ""
    return prompt, write(one, tools), write(other, tools), followed


def _tokens_in(tokenizer: Any, tail: str) -> list[str]:
    """The added tokens that end an answer: the first in ``tail``, and those that follow it before any blank.

    Special tokens, or where there is none of them other added tokens that are no blanks.
    """
    added = [str(token) for token in tokenizer.get_added_vocab() if str(token).strip()]
    for known in (_special_tokens(tokenizer), added):
        matches = list(_find(known, tail))
        if matches:
            first = matches[0].start()
            end = first + len("".join(takewhile(lambda letter: not letter.isspace(), tail[first:])))
            return [match[0] for match in matches if match.start() < end]
    return []


def _special_tokens(tokenizer: Any) -> list[str]:
    named = set(tokenizer.all_special_tokens)
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special or str(token) in named]


def _find(tokens: Sequence[str], text: str) -> Iterator[re.Match[str]]:
    """Every place of one of ``tokens`` in ``text``; the longest counts where several begin."""
    if not tokens:
        return iter(())
    return re.finditer("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), text)
