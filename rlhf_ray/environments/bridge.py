"""What stands between an answer and the next one: the ids that are put behind all that was sampled.

Invariants: the next prompt begins with all ids before it, whatever was sampled; nothing that was sampled is encoded again. An
answer that was cut off is given the end token that it lacks. What a chat template writes between an answer and the next one
does not depend on the answer, so it is found with an answer that stands in for it. Where a template writes earlier turns
otherwise than they were read and sampled, such as without thinking, the log says once that episodes keep them.
"""

from __future__ import annotations

from contextlib import suppress

from rlhf_ray.console import get_logger
from rlhf_ray.data.answer_ids import shared_length, tokenize
from rlhf_ray.data.chat import ChatFormat, Conversation
from rlhf_ray.data.chat_template import open_thinking
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.environments.protocol import Observation
from rlhf_ray.errors import RequestError

STAND_INS = ("Take this a", "Take this b")
"""Answers that differ in their last letter: what both renderings end with is what the template writes after an answer."""


class Bridge:
    """Leads from one answer to the next prompt, in the format ``chat``."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.looked = False
        """Whether it is known what the template does with earlier answers."""

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
        self._warn(prompt, observation)
        if finished and ending.tail:
            text = text.removeprefix(ending.tail.partition(ending.token)[0] + ending.token)
        return tokenize(self.chat.tokenizer, [text])[0]

    def _after_answer(self, prompt: TokenizedPrompt, observation: Observation) -> str:
        """What the template writes after the last letter of an answer, its end token included."""
        one, other = (self._render(prompt, answer, observation) for answer in STAND_INS)
        return one[len(one) - shared_length(one[::-1], other[::-1]) :]

    def rewrites(self, prompt: TokenizedPrompt, observation: Observation) -> bool:
        """Whether the template writes a turn, its answer plain or with thinking, otherwise once another turn follows it."""
        block = open_thinking(prompt.text)
        opening, closing = (block.opening, block.closing) if block else ("<think>", "</think>")
        thoughtful = f"{'' if block else opening + chr(10)}A thought.\n{closing}\n\n{STAND_INS[0]}"
        answers = (STAND_INS[0], thoughtful)
        return any(not self._render(prompt, answer, observation).startswith(prompt.text + answer) for answer in answers)

    def _warn(self, prompt: TokenizedPrompt, observation: Observation) -> None:
        if self.looked:
            return
        self.looked = True
        with suppress(Exception):  # a template is a program, and may refuse thinking that no policy has written
            if self.rewrites(prompt, observation):
                get_logger("environments").warning(
                    "rollout.environment: the chat template writes earlier turns otherwise than the policy read and sampled "
                    "them, such as without their thinking; an episode keeps them as they were"
                )

    def _render(self, prompt: TokenizedPrompt, answer: str, observation: Observation) -> str:
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)
        turns = [*(prompt.messages or ()), {"role": "assistant", "content": answer}, *messages]
        return self.chat.prompt_text(Conversation(turns, prompt.tools, prompt.template_variables))
