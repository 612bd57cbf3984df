"""One score an answer, in order, or an error: as TRL and verl call their reward functions, over the app in this process."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.rewards import adapters, compute_score, remote_reward
from rlhf_ray.rewards.request import ScoreRequest

from ..serving.services import Lengths, service

TOKEN = "a-token-that-is-long"
URL = f"http://x:{TOKEN}@test"
TURNS = [{"role": "user", "content": "ab"}]


@pytest.fixture
def backend() -> Lengths:
    return Lengths()


@pytest.fixture
def transport(backend: Lengths) -> httpx.ASGITransport:
    role = ScoringRole(model=ModelConfig(path="model"))
    config = ServeConfig(kind="serve", run=RunConfig(name="test"), reward=role)
    return httpx.ASGITransport(service(config, backend, keys=lambda: {TOKEN: "test"}))


def received(backend: Lengths) -> list[ScoreRequest]:
    return [request for batch in backend.batches for request in batch]


def test_trl_gets_one_reward_an_answer(backend: Lengths, transport: httpx.ASGITransport) -> None:
    reward = remote_reward(URL, transport=transport)
    assert inspect.iscoroutinefunction(reward) and reward.__name__ == "remote_reward", "TRL looks at both"
    completions = [[{"role": "assistant", "content": "cde"}]]

    async def run() -> list[float]:
        texts = await reward(prompts=["a", "b"], completions=["bcd", ""], completion_ids=[[1], [2]], label=[0, 1])
        return texts + await reward(prompts=[TURNS], completions=completions, log_metric=None)

    assert asyncio.run(run()) == [4.0, 1.0, 5.0]
    assert received(backend) == [
        ScoreRequest(prompt="a", response="bcd"),
        ScoreRequest(prompt="b", response=""),
        ScoreRequest(messages=(*TURNS, *completions[0])),
    ]


def test_trl_sends_all_that_the_template_reads(backend: Lengths, transport: httpx.ASGITransport) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    completion = [call, {"role": "tool", "content": "nine"}, {"role": "assistant", "content": "Nine."}]
    tools, variables = [{"name": "clock"}], {"enable_thinking": False}
    columns = {"tools": [tools, None], "chat_template_kwargs": [variables, None], "label": [1, 2]}
    reward = remote_reward(URL, transport=transport)
    asyncio.run(reward([TURNS, TURNS], [completion, completion[2:]], **columns))  # type: ignore[arg-type]
    assert received(backend) == [
        ScoreRequest(messages=(*TURNS, *completion), tools=tuple(tools), chat_template_kwargs=variables),
        ScoreRequest(messages=(*TURNS, completion[2])),
    ]


def test_it_works_from_one_event_loop_after_another(transport: httpx.ASGITransport) -> None:
    reward = remote_reward(URL, transport=transport)
    assert [asyncio.run(reward(["a"], ["b"])) for _ in range(3)] == [[2.0]] * 3  # type: ignore[arg-type]


def test_an_answer_without_a_reward_is_an_error_not_a_zero(transport: httpx.ASGITransport) -> None:
    reward = remote_reward(URL, transport=transport)
    with pytest.raises(ScoringError, match="answer 1 has no reward: the item is empty"):
        asyncio.run(reward(["a", ""], ["b", ""]))  # type: ignore[arg-type]


@pytest.fixture
def verl(transport: httpx.ASGITransport, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """``verl(solution, extra_info, ...)`` as its reward loop calls."""
    monkeypatch.setattr(adapters, "_shared_clients", {(URL, None): adapters._Clients(URL, None, transport=transport)})

    def call(solution: str, extra_info: Any, **options: Any) -> float:
        return asyncio.run(compute_score("gsm8k", solution, "42", extra_info, **options))

    return call


@pytest.mark.parametrize("prompt", ["ab", TURNS])
@pytest.mark.parametrize("key", ["prompt", "question"])
def test_verl_gets_the_reward_of_an_answer_to_its_prompt(
    verl: Callable[..., float], monkeypatch: pytest.MonkeyPatch, prompt: Any, key: str
) -> None:
    assert verl("cde", {key: prompt, "split": "train"}, url=URL, reward_router_address=None) == 5.0
    monkeypatch.setenv(adapters.URL_VARIABLE, URL)
    assert verl("cde", {key: prompt}) == 5.0


def test_what_verl_lacks_is_told(verl: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(adapters.URL_VARIABLE, raising=False)
    with pytest.raises(RequestError, match=f"set {adapters.URL_VARIABLE}, or url in reward_kwargs"):
        verl("a", {"prompt": "b"})
    for nothing in (None, {}, {"prompt": None}):
        with pytest.raises(RequestError, match="extra_info of a row of gsm8k holds none"):
            verl("a", nothing, url=URL)
