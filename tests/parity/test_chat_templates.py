"""The comparison over published templates finds templates equal that are, and says where one is not."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.data.chat_templates import SHAPES

from . import chat_templates
from .chat_templates import ANSWERS, QUESTIONS, differences

NAMES = {
    "mine__Qwen2.5": "a newline after the end",
    "mine__Phi-3.5": "an end of the turn and then an end of the conversation",
    "mine__deepseek": "a think block that the prompt opens and a finished answer has not",
}
ALL = len(QUESTIONS) * len(ANSWERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_conversation_of_a_template_is_equal(name: str) -> None:
    template = SHAPES[NAMES[name]].template.replace("<|end_of_sentence|>", "<｜end▁of▁sentence｜>")
    assert Counter(differences(name, template)) == {"equal": ALL}


def test_another_end_than_the_policys_is_told_for_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "end_of", lambda name: "<|im_start|>")
    outcomes = list(differences("mine__Qwen2.5", SHAPES[NAMES["mine__Qwen2.5"]].template))
    assert len(outcomes) == ALL
    assert all("training, PPO's reward, PPO's reward, another stop, messages" in line for line in outcomes)
