"""The reward of each turn of a conversation, by a model that scores a conversation at its last answer.

Always true: a conversation has one result for each turn of the assistant, in order; a turn is scored with all that was said
before it and nothing that came after; all turns of all conversations are asked for in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

Conversation = Sequence[Mapping[str, str]]
Score = Callable[[Sequence[ScoreRequest]], Sequence[ScoreResult]]
"""One result a request, in order: ``RewardClient.score``, for one."""


def turn_requests(conversation: Conversation) -> list[ScoreRequest]:
    """The conversation up to each turn of the assistant."""
    ends = [number for number, turn in enumerate(conversation, 1) if turn["role"] == "assistant"]
    if not ends:
        raise RequestError("a conversation without a turn of the assistant has nothing to score")
    return [ScoreRequest(messages=tuple(conversation[:end])) for end in ends]


def score_turns(score: Score, conversations: Sequence[Conversation]) -> list[list[ScoreResult]]:
    """The results of every turn of the assistant, conversation by conversation; ``score`` is a client's or a model's."""
    requests = [turn_requests(conversation) for conversation in conversations]
    results = iter(score([request for turns in requests for request in turns]))
    return [[next(results) for _ in turns] for turns in requests]
