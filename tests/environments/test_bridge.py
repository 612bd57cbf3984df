"""What stands between an answer and the next one is what the chat template writes there, whatever the answer was."""

from __future__ import annotations

import pytest

from rlhf_ray.data.chat import ChatFormat, Conversation
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.environments.bridge import Bridge
from rlhf_ray.errors import RequestError

from ..data.chat_templates import SHAPES, make_tokenizer

USER = {"role": "user", "content": "Which one?"}
ANSWERS = ["the", " yes ", "Take this a"]


@pytest.mark.parametrize("name", SHAPES)
def test_prompt_answer_and_bridge_are_the_whole_conversation_where_a_template_keeps_its_past(name):
    shape = SHAPES[name]
    chat = ChatFormat(make_tokenizer(shape), shape.variables)
    text = chat.prompt_text(Conversation([USER]))
    prompt = TokenizedPrompt(0, text, tuple(chat.prompt_ids([USER])), messages=(USER,))
    for answer in ANSWERS:
        talk = [USER, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
        whole = chat.prompt_text(Conversation(talk))
        cut, ended = (
            chat.tokenizer.decode(
                Bridge(chat).between(prompt, "And now?", finished=finished), skip_special_tokens=False
            )
            for finished in (False, True)
        )
        assert whole.endswith(cut), "whatever becomes of earlier turns, what follows an answer is the template's"
        assert whole.removesuffix(cut).rstrip().endswith(answer.strip())
        if whole.startswith(text + answer):
            assert f"{text}{answer}{cut}" == whole
        own_end = chat.ending.tail.partition(chat.ending.token)[0] + chat.ending.token
        assert ended == (cut.removeprefix(own_end) if chat.ending.tail else cut), (
            "what was sampled is not written again"
        )
        generation_prompt = text[text.index("Which one?") + len("Which one?") :]
        assert ended.endswith(generation_prompt), "the assistant is to answer next"


def test_messages_after_a_plain_text_are_refused():
    shape = next(iter(SHAPES.values()))
    chat = ChatFormat(make_tokenizer(shape), shape.variables)
    with pytest.raises(RequestError, match="return a text"):
        Bridge(chat).between(TokenizedPrompt(0, "q", (1,)), [USER], finished=True)


REWRITING = {
    "an empty think block before a finished answer",
    "a think block that the prompt opens and a finished answer closes",
    "a think block that the prompt opens and a finished answer has not",
    "no end at all",
    "the next header after everything",
    "a channel before a finished answer, and another end in the middle",
}
"""Shapes of templates that write an earlier turn otherwise, most of them its thinking."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_template_that_writes_earlier_turns_otherwise_is_told_of_once(name, project_log):
    shape = SHAPES[name]
    chat = ChatFormat(make_tokenizer(shape), shape.variables)
    prompt = TokenizedPrompt(0, chat.prompt_text(Conversation([USER])), (1,), messages=(USER,))
    bridge = Bridge(chat)
    for _ in range(2):
        bridge.between(prompt, "And now?", finished=True)
    assert project_log.getvalue().count("writes earlier turns otherwise") == (name in REWRITING)
