"""A call ends in one result for each request, in order, or in one typed error; what may pass is tried again, what may not is
an error at once; connections are reused; a token in the address is shown nowhere.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.rewards import AsyncRewardClient, RewardClient, ScoreRequest, ScoreResult
from rlhf_ray.serving.server import WebServer

from .services import Lengths, service

TOKEN = "a-token-that-is-long"
REQUESTS = [
    ScoreRequest(token_ids=(3, 1, 4)),
    ScoreRequest(text="two", truncate=True),
    ScoreRequest(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"})),
    ScoreRequest(
        messages=(
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
        ),
        tools=({"name": "clock"},),
        chat_template_kwargs={"enable_thinking": False},
        finished=False,
    ),
    ScoreRequest(prompt="four", response="words"),
    ScoreRequest(text=""),
]


class Echo(Lengths):
    """Scores an item by what it holds; refuses an empty text."""

    def __init__(self) -> None:
        super().__init__("echo")
        self.received: list[ScoreRequest] = []

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        self.received += requests
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> ScoreResult:
        if request.text == "":
            return ScoreResult.failed("the item is empty")
        result = ScoreResult.of(float(len(repr(request))), 7, truncated=request.truncate)
        return result.normalised(1.0, 2.0)


Score = Callable[..., list[ScoreResult]]


def score_sync(url: str, requests: Sequence[ScoreRequest], **options: Any) -> list[ScoreResult]:
    with RewardClient(url, **options) as client:
        return client.score(requests)


def score_async(url: str, requests: Sequence[ScoreRequest], **options: Any) -> list[ScoreResult]:
    async def run() -> list[ScoreResult]:
        async with AsyncRewardClient(url, **options) as client:
            return await client.score(requests)

    return asyncio.run(run())


@pytest.fixture(params=[score_sync, score_async])
def score(request: pytest.FixtureRequest) -> Score:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def serve() -> Iterator[Callable[[Starlette], WebServer]]:
    """``serve(app)``: a server that answers until the test ends."""
    servers: list[WebServer] = []

    def start(app: Starlette) -> WebServer:
        servers.append(WebServer("127.0.0.1", 0))
        servers[-1].start(app)
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def backend() -> Echo:
    return Echo()


@pytest.fixture
def address(backend: Echo, serve: Callable[[Starlette], WebServer], config: Callable[..., ServeConfig]) -> str:
    """A scoring backend behind a token."""
    return serve(service(config(), backend, keys=lambda: {TOKEN: "test"})).address


def test_every_representation_gets_there_and_comes_back_in_order(score: Score, address: str, backend: Echo) -> None:
    results = score(address, REQUESTS, token=TOKEN)
    assert backend.received == REQUESTS
    assert results == asyncio.run(Echo().score(REQUESTS))
    assert score(address, [], token=TOKEN) == []


def test_the_token_may_be_the_password_in_the_address(score: Score, address: str) -> None:
    assert len(score(address.replace("http://", f"http://x:{TOKEN}@"), REQUESTS)) == len(REQUESTS)


@pytest.mark.parametrize("token", [None, "another-token-that-is-long"])
def test_a_wrong_token_is_an_error(score: Score, address: str, token: str | None) -> None:
    with pytest.raises(RequestError, match="refuses without a token that it knows"):
        score(address, REQUESTS, token=token)


def test_the_token_is_shown_nowhere(score: Score, serve: Callable[..., WebServer], caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(scripted([500]))
    with pytest.raises(ScoringError) as caught:
        score(server.address.replace("http://", f"http://x:{TOKEN}@"), REQUESTS)
    assert server.address in str(caught.value)
    assert TOKEN not in str(caught.value) + caplog.text


def test_a_batch_beyond_the_servers_limit_is_an_error_that_tells_the_limit(
    score: Score, serve: Callable[..., WebServer], config: Callable[..., ServeConfig]
) -> None:
    server = serve(service(config(max_items=3), Echo()))
    with pytest.raises(RequestError, match=r"413: .*6 items in one request, the limit is 3"):
        score(server.address, REQUESTS)


ANSWER = {"results": [vars(ScoreResult.of(0.5, 3))]}
ONE = [ScoreRequest(text="a")]


def scripted(answers: list[Any], seen: list[Any] | None = None) -> Starlette:
    """Answers with a status, or 200 and a body; the last one again and again."""

    async def reward(request: Request) -> Response:
        if seen is not None:
            seen.append((request.client, time.monotonic(), await request.body()))
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            return Response(f"said {answer}", answer, {"Retry-After": "1"} if answer == 429 else {})
        return Response(answer if isinstance(answer, str) else json.dumps(answer), 200)

    return Starlette(routes=[Route("/v1/reward", reward, methods=["POST"])])


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_tried_again(score: Score, serve: Callable[..., WebServer], status: int) -> None:
    seen: list[Any] = []
    server = serve(scripted([status, status, ANSWER], seen))
    assert score(server.address, ONE) == [ScoreResult.of(0.5, 3)]
    assert len(seen) == 3
    assert len({body for _, _, body in seen}) == 1, "the same is asked each time"
    assert len({client for client, _, _ in seen}) == 1, "over one connection"
    waits = [after - before for (_, before, _), (_, after, _) in itertools.pairwise(seen)]
    assert min(waits) >= (1.0 if status == 429 else 0.12), "it waits, and at least as long as it is told to"


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, RequestError, "refuses the request: 400: said 400"),
        (404, RequestError, "refuses the request: 404"),
        (422, RequestError, "refuses the request: 422"),
        (500, ScoringError, "answers 500: said 500"),
        (307, ScoringError, "answers 307"),
    ],
)
def test_what_may_not_pass_is_an_error_at_once(
    score: Score, serve: Callable[..., WebServer], status: int, error: type[Exception], message: str
) -> None:
    seen: list[Any] = []
    server = serve(scripted([status, ANSWER], seen))
    with pytest.raises(error, match=message):
        score(server.address, ONE)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "answers, but not as a scoring backend does"),
        ("[]", "answers, but not as a scoring backend does"),
        ({"rewards": [1.0]}, "answers, but not as a scoring backend does"),
        ({"results": [{"reward": 1.0}]}, "answers, but not as a scoring backend does"),
        ({"results": []}, "answers 0 results for 1 requests"),
        ({"results": ANSWER["results"] * 2}, "answers 2 results for 1 requests"),
        ({"results": [{**ANSWER["results"][0], "reward": None}]}, "two finite numbers, or an error"),
        ('{"results": [{"raw": NaN, "reward": NaN, "tokens": 1, "truncated": false, "error": null, "fault": null}]}',
         "two finite numbers, or an error"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(
    score: Score, serve: Callable[..., WebServer], answer: Any, message: str
) -> None:
    server = serve(scripted([answer]))
    with pytest.raises(ScoringError, match=message):
        score(server.address, ONE)


def test_an_answer_may_say_more(score: Score, serve: Callable[..., WebServer]) -> None:
    more = {**ANSWER["results"][0], "news": 1}
    assert score(serve(scripted([{"results": [more], "news": 1}])).address, ONE) == [ScoreResult.of(0.5, 3)]


def test_a_server_that_is_not_there_yet_is_waited_for(score: Score, config: Callable[..., ServeConfig]) -> None:
    server = WebServer("127.0.0.1", 0)
    timer = threading.Timer(0.6, server.start, [service(config(), Echo())])
    timer.start()
    try:
        assert len(score(server.address, REQUESTS)) == len(REQUESTS)
    finally:
        timer.join()
        server.stop()


def test_waiting_ends(score: Score, serve: Callable[..., WebServer]) -> None:
    server = serve(scripted([503]))
    began = time.monotonic()
    with pytest.raises(ScoringError, match=rf"no rewards from {server.address}/? within 0.6 s: 503: said 503"):
        score(server.address, ONE, hold_s=0.6)
    assert 0.6 <= time.monotonic() - began < 30


def test_a_server_that_does_not_answer_is_given_up(score: Score) -> None:
    server = WebServer("127.0.0.1", 0)
    with pytest.raises(ScoringError, match=r"within 0.3 s: ConnectError"):
        score(server.address, ONE, hold_s=0.3)
    server.stop()


@pytest.mark.parametrize("url", ["127.0.0.1:5000", "localhost:5000", "ftp://host", "http://", ""])
def test_what_is_no_address_is_an_error(score: Score, url: str) -> None:
    with pytest.raises(RequestError, match="http://host:port"):
        score(url, ONE)


def test_both_clients_tell_what_is_served_and_try_again_for_it(serve: Callable[..., WebServer]) -> None:
    statuses = [503, 200, 502, 200]

    async def info(request: Request) -> Response:
        return Response(json.dumps({"model": "echo"}), statuses.pop(0))

    address = serve(Starlette(routes=[Route("/info", info)])).address

    async def ask() -> Any:
        async with AsyncRewardClient(address) as client:
            return await client.info()

    with RewardClient(address) as client:
        assert client.info() == asyncio.run(ask()) == {"model": "echo"}
    assert statuses == []


def test_connections_are_kept(serve: Callable[..., WebServer]) -> None:
    seen: list[Any] = []
    server = serve(scripted([ANSWER], seen))
    with RewardClient(server.address) as client:
        for _ in range(5):
            client.score(ONE)
    assert len({who for who, _, _ in seen}) == 1


def test_many_calls_at_once_share_a_pool(address: str, backend: Echo) -> None:
    async def run() -> list[list[ScoreResult]]:
        async with AsyncRewardClient(address, token=TOKEN) as client:
            return await asyncio.gather(*(client.score([ScoreRequest(token_ids=(i,) * i)]) for i in range(1, 150)))

    results = asyncio.run(run())
    assert [result.tokens for (result,) in results] == [7] * 149
    expected = asyncio.run(Echo().score([ScoreRequest(token_ids=(i,) * i) for i in range(1, 150)]))
    assert [result for (result,) in results] == expected


def test_a_transport_of_ones_own_is_used(config: Callable[..., ServeConfig]) -> None:
    app = service(config(), Echo())
    results = score_async("http://anywhere", ONE, transport=httpx.ASGITransport(app))
    assert len(results) == 1


def test_an_answer_that_takes_too_long_names_the_limit(score: Score, serve: Callable[[Starlette], WebServer]) -> None:
    async def sleep(request: Request) -> Response:
        await asyncio.sleep(1.0)
        return Response()

    server = serve(Starlette(routes=[Route("/v1/reward", sleep, methods=["POST"])]))
    told = r"ReadTimeout: no answer within 0\.2 s \(timeout_s, of a run's source reward\.timeout_s\)"
    with pytest.raises(ScoringError, match=told):
        score(server.address, REQUESTS[:1], timeout_s=0.2, hold_s=0.0)
