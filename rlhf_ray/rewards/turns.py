"""Scores each turn of a conversation with a model that scores a conversation at its last answer.

Invariants: a conversation gets one result per turn of the assistant, in order; a turn is scored with everything before it and
nothing after it; all turns of all conversations are scored in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rows.conversations import plain_messages

Conversation = Sequence[Mapping[str, Any]]
Score = Callable[[Sequence[ScoreRequest]], Sequence[ScoreResult]]
"""Gives one result per request, in order, as ``RewardClient.score`` does."""


def turn_requests(conversation: Conversation) -> list[ScoreRequest]:
    """The conversation up to each turn of the assistant."""
    conversation = plain_messages(conversation)
    ends = [number for number, turn in enumerate(conversation, 1) if turn.get("role") == "assistant"]
    if not ends:
        raise RequestError("a conversation without a turn of the assistant has nothing to score")
    return [ScoreRequest(messages=tuple(conversation[:end])) for end in ends]


def score_turns(score: Score, conversations: Sequence[Conversation]) -> list[list[ScoreResult]]:
    """The results of every turn of the assistant, conversation by conversation; ``score`` is a client's or a model's."""
    requests = [turn_requests(conversation) for conversation in conversations]
    results = iter(score([request for turns in requests for request in turns]))
    return [[next(results) for _ in turns] for turns in requests]
