"""Reward functions for the trainers of verl and TRL, which get their scores from a scoring backend.

Invariants: one score per answer, in order, or an error; a failed score is never 0 and never left out. Nothing here needs more
than an HTTP client, so that this package can be installed into their environments without the libraries it trains with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.rewards.client import AsyncRewardClient
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

URL_VARIABLE, TOKEN_VARIABLE = "RLHF_RAY_REWARD_URL", "RLHF_RAY_REWARD_TOKEN"
PROMPT_KEYS = ("prompt", "question")
"""Where verl's ``extra_info`` may hold the prompt."""
BESIDE_CONVERSATIONS = ("tools", "chat_template_kwargs")
"""Columns that a template reads beside the messages."""

Turns = Sequence[Mapping[str, Any]]
RewardFunction = Callable[..., Awaitable[list[float]]]


class _Clients:
    """One client per event loop, since connections belong to the loop that opened them."""

    def __init__(self, url: str, token: str | None, **options: Any) -> None:
        self._url, self._token, self._options = url, token, options
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncRewardClient] = WeakKeyDictionary()

    async def rewards(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """The rewards of all requests; raises where one has none."""
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            self._by_loop[loop] = AsyncRewardClient(self._url, token=self._token, **self._options)
        results = await self._by_loop[loop].score(requests)
        return [_reward(position, result) for position, result in enumerate(results)]


def _reward(position: int, result: ScoreResult) -> float:
    if result.reward is None:
        raise ScoringError(f"answer {position} has no reward: {result.error}")
    return result.reward


def remote_reward(url: str, *, token: str | None = None, truncate: bool = False, **options: Any) -> RewardFunction:
    """A reward function for TRL's ``reward_funcs`` that gets its scores from the backend at ``url``.

    Prompts and completions are texts, scored as prompt and response, or conversations, scored whole with what the data set's
    columns ``tools`` and ``chat_template_kwargs`` hold; the reward model reads them as it was trained. ``options`` are those
    of :class:`~rlhf_ray.rewards.AsyncRewardClient`.
    """
    clients = _Clients(url, token, **options)

    async def remote_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        requests = []
        for row, (prompt, answer) in enumerate(zip(prompts, completions, strict=True)):
            beside = {name: columns[name][row] for name in BESIDE_CONVERSATIONS if columns.get(name) is not None}
            requests.append(_request(prompt, answer, truncate, **beside))
        return await clients.rewards(requests)

    return remote_reward


def _request(prompt: str | Turns, answer: str | Turns, truncate: bool = False, **beside: Any) -> ScoreRequest:
    if isinstance(prompt, str) and isinstance(answer, str):
        return ScoreRequest(prompt=prompt, response=answer, truncate=truncate)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return ScoreRequest(messages=tuple(map(dict, (*before, *after))), truncate=truncate, **beside)


_shared_clients: dict[tuple[str, str | None], _Clients] = {}


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    token: str | None = None,
    truncate: bool = False,
    **_: Any,
) -> float:
    """verl's custom reward function: the reward of ``solution_str`` as an answer to the prompt in ``extra_info``.

    ``url`` and ``token`` come from ``reward_kwargs``, or from the environment variables ``RLHF_RAY_REWARD_URL`` and
    ``RLHF_RAY_REWARD_TOKEN``.
    """
    url, token = url or os.environ.get(URL_VARIABLE), token or os.environ.get(TOKEN_VARIABLE)
    if not url:
        raise RequestError(f"compute_score needs a scoring backend: set {URL_VARIABLE}, or url in reward_kwargs")
    extra = extra_info or {}
    prompt = next((extra[key] for key in PROMPT_KEYS if extra.get(key) is not None), None)
    if prompt is None:
        raise RequestError(
            f"compute_score scores an answer to its prompt, but extra_info of a row of {data_source} holds none: put it "
            f"there under {' or '.join(PROMPT_KEYS)}, as a text or as messages"
        )
    clients = _shared_clients.setdefault((url, token), _Clients(url, token))
    (reward,) = await clients.rewards([_request(prompt, solution_str, truncate)])
    return reward
