"""One sampled answer as text: everything that a reward source, and a user's reward function, may look at.

Invariants: a sample is never changed once it is made; all samples of one prompt share ``prompt_id``, ``prompt``, ``label``
and ``source``. :func:`text_sample` writes the fields from the prompt's row in the data and from what the rollout engine
returned, for PPO and for ``rlhf-ray generate``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.data.load import TokenizedPrompt


@dataclass(frozen=True)
class TextSample:
    """One answer to one prompt. A reward function is given some fields as lists; each field names its list."""

    prompt_id: int
    """Row of the prompt in the data, counted from 0 over all training files; the held-out prompts are counted on from there."""
    sample_index: int
    """Which of the answers to this prompt it is, counted from 0."""
    prompt: str
    """List ``prompts``: the prompt as the policy reads it. Of a conversation it is the text that the chat template gives."""
    response: str
    """List ``responses``: the decoded answer without special tokens and without the token that ended it. It is not
    stripped: spaces at its ends stay."""
    label: Any
    """List ``labels``: what the prompt's row holds for judging answers (``data.label_key``), such as the right result. A number
    is text here; a list, a mapping or a truth value is what the row holds. None where the row has no label. The policy never
    reads it."""
    finished: bool
    """List ``finished``: whether the policy ended the answer itself. False where it was cut off, for example at
    ``rollout.max_new_tokens``."""
    token_ids: tuple[int, ...]
    """Ids of prompt and answer in the policy's vocabulary, exactly as they were sampled."""
    source: str = ""
    """List ``sources``: the name of the data source that the prompt comes from; empty where it has none."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """List ``messages``: the conversation as mappings of ``role`` and ``content``, the answer as its last turn; none where
    the prompt is plain text."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """The functions that the conversation may call, for reward models; none where its row has no ``tools``."""
    template_variables: Mapping[str, Any] | None = None
    """The variables that the prompt's row gives to a chat template, for reward models."""
    episode_reward: float | None = None
    """The sum of the rewards that the environment of its episode gave; none without an environment, and where it failed."""
    episode_failure: int = 0
    """Why the environment gave none (``EpisodeFailure``)."""


def text_sample(
    prompt: TokenizedPrompt,
    sample_index: int,
    answer: Sequence[int],
    *,
    finished: bool,
    tokenizer: Any,
    stop_tokens: Collection[int],
    **outcome: Any,
) -> TextSample:
    """The answer with the ids ``answer`` to ``prompt``; ``stop_tokens`` end one, ``outcome`` is that of its episode."""
    ended = finished and answer[-1:] and answer[-1] in stop_tokens
    response = tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)
    conversation = prompt.messages and (*prompt.messages, {"role": "assistant", "content": response})
    return TextSample(
        prompt_id=prompt.prompt_id,
        sample_index=sample_index,
        prompt=prompt.text,
        response=response,
        label=prompt.label,
        finished=finished,
        token_ids=(*prompt.token_ids, *answer),
        source=prompt.source,
        messages=conversation,
        tools=None if prompt.tools is None else tuple(prompt.tools),
        template_variables=prompt.template_variables,
        **outcome,
    )
