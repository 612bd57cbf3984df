"""What stands between an answer and the next one: the ids that are put behind all that was sampled.

Invariants: the next prompt begins with all ids before it, whatever was sampled; nothing that was sampled is encoded again. An
answer that was cut off is given the end token that it lacks. What a chat template writes between an answer and the next one
does not depend on the answer, so it is found with an answer that stands in for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.data.answer_ids import shared_length, tokenize
from rlhf_ray.data.chat import ChatFormat, Conversation
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.environments.protocol import Observation
from rlhf_ray.errors import RequestError

STAND_INS = ("Take this a", "Take this b")
"""Answers that differ in their last letter: what both renderings end with is what the template writes after an answer."""


class Bridge:
    """Leads from one answer to the next prompt, in the format ``chat``."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat

    def between(self, prompt: TokenizedPrompt, observation: Observation, *, finished: bool) -> list[int]:
        """The ids that follow an answer in an episode of ``prompt``, up to where the policy answers next.

        Raises :class:`RequestError` for messages after a plain text, and what a template refuses.
        """
        if prompt.messages is None:
            if not isinstance(observation, str):
                raise RequestError("the observation is messages, but the prompt is a plain text: return a text")
            ids = tokenize(self.chat.tokenizer, [observation])[0]
            return ids if finished else [self.chat.tokenizer.eos_token_id, *ids]
        text, ending = self._after_answer(prompt, observation), self.chat.ending
        if finished and ending.tail:
            text = text.removeprefix(ending.tail.partition(ending.token)[0] + ending.token)
        return tokenize(self.chat.tokenizer, [text])[0]

    def _after_answer(self, prompt: TokenizedPrompt, observation: Observation) -> str:
        """What the template writes after the last letter of an answer, its end token included."""
        assert prompt.messages is not None
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
        one, other = (self._render(prompt, answer, messages) for answer in STAND_INS)
        return one[len(one) - shared_length(one[::-1], other[::-1]) :]

    def _render(self, prompt: TokenizedPrompt, answer: str, messages: Sequence[Any]) -> str:
        turns = [*(prompt.messages or ()), {"role": "assistant", "content": answer}, *messages]
        return self.chat.prompt_text(Conversation(turns, prompt.tools, prompt.template_variables))
