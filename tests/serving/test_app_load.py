"""Overload is answered at once; a caller that went away costs nothing more; texts reach no log; operators learn what is
served. All over a real reward worker.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.other_pages import SERVICE_METRICS, ServiceMetric
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.backend import GroupBackend

from .reward_models import EOS, MEAN, STD, Reference
from .served_model import LIMIT, MakeConfig, ask, backend_of, close, post
from .services import served_models, service

get_logger()  # set up before pytest looks where to listen
pytestmark = pytest.mark.usefixtures("torch_threads")
SECRET = "my-secret-text"
TEI_KEYS = (
    "model_id", "model_sha", "model_dtype", "max_input_length", "max_batch_tokens", "max_client_batch_size",
    "max_concurrent_requests", "max_batch_requests", "tokenization_workers", "sha", "docker_label",
)  # fmt: skip
"""What clients of text-embeddings-inference look for."""


class Gated(GroupBackend):
    """The real backend, but forwards wait for ``open``."""

    def __init__(self, group: RewardGroup, config: ServeConfig) -> None:
        super().__init__(group, config.reward.model, normalize=config.normalize)
        self.open = asyncio.Event()
        self.scored: list[ScoreRequest] = []

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        self.scored += requests
        await self.open.wait()
        return await super().score(requests)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_overload_is_answered_while_the_model_is_busy(group: RewardGroup, config: MakeConfig, model: Path) -> None:
    settings = config(str(model), max_queue_items=2)
    gated = Gated(group, settings)

    async def crowd(client: httpx.AsyncClient) -> tuple[httpx.Response, list[httpx.Response]]:
        first = asyncio.create_task(client.post("/get_reward", json={"query": ["a"]}))
        await settle()
        waiting = asyncio.create_task(client.post("/get_reward", json={"query": ["b", "c"]}))
        await settle()
        refused = await client.post("/v1/reward", json={"items": [{"text": "d"}]})
        assert not first.done() and not waiting.done(), "the refusal waited for the model"
        gated.open.set()
        return refused, [await first, await waiting]

    refused, answered = ask(service(settings, gated), crowd)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "2 items are waiting, as many as the queue holds" in refused.json()["error"]
    assert [response.status_code for response in answered] == [200, 200]
    assert [request.text for request in gated.scored] == ["a", "b", "c"]


def test_clients_that_ask_while_the_model_is_busy_share_one_forward(
    group: RewardGroup, config: MakeConfig, model: Path, reference: Reference
) -> None:
    settings = config(str(model))
    gated = Gated(group, settings)
    texts = [f"number {number}" for number in range(40)]

    async def crowd(client: httpx.AsyncClient) -> tuple[list[float], str]:
        asking = []
        for text in texts:
            asking.append(asyncio.create_task(client.post("/get_reward", json={"query": [text]})))
            while len(gated.scored) != 1:
                await settle()
        while "waiting_items 39.0\n" not in (await client.get("/metrics")).text:
            await settle()
        gated.open.set()
        rewards = [(await one).json()["rewards"][0] for one in asking]
        return rewards, (await client.get("/metrics")).text

    rewards, metrics = ask(service(settings, gated), crowd)
    assert rewards == [close(reference.of_text(text)) for text in texts]
    assert 'rlhf_scoring_items_total{model="reward"} 40.0\n' in metrics
    assert 'rlhf_scoring_forwards_total{model="reward"} 2.0\n' in metrics, (
        "the first one's, and one for all who came during it"
    )


def test_a_client_that_left_costs_nothing_more(group: RewardGroup, config: MakeConfig, model: Path) -> None:
    settings = config(str(model))
    gated = Gated(group, settings)
    app = service(settings, gated)

    async def run() -> list[Any]:
        gone, sent = asyncio.Event(), []
        messages = iter([{"type": "http.request", "body": b'{"query": ["left"]}', "more_body": False}])

        async def receive() -> Any:
            if (message := next(messages, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/get_reward", "headers": [], "query_string": b""}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            busy = asyncio.create_task(client.post("/get_reward", json={"query": ["busy"]}))
            await settle()
            leaving = asyncio.create_task(app(scope, receive, send))
            await settle()
            gone.set()
            await asyncio.wait_for(leaving, timeout=5)
            gated.open.set()
            assert (await busy).status_code == 200
            after = await client.get("/metrics")
        assert 'requests_total{protocol="openrlhf",status="499"} 1' in after.text
        assert "waiting_items 0.0" in after.text
        return sent

    asyncio.run(asyncio.wait_for(run(), timeout=30))
    assert [request.text for request in gated.scored] == ["busy"]


def test_texts_reach_no_log(
    group: RewardGroup,
    config: MakeConfig,
    model: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Failing(GroupBackend):
        async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
            raise ValueError(f"cannot read {requests[0].text}")

    settings = config(str(model))
    served, failing = (
        service(settings, backend_of(group, settings)),
        service(settings, Failing(group, settings.reward.model, normalize=False)),
    )
    bodies = [{"query": [SECRET]}, {"query": [SECRET * 100]}, {"query": [SECRET, 1]}, {"query": SECRET}]
    for path, key in (("/get_reward", "query"), ("/v1/reward", "items")):
        for body in bodies:
            post(served, path, {key: body["query"]})
    broken = post(failing, "/get_reward", {"query": [SECRET]})
    assert broken.status_code == 500
    assert broken.json() == {"error": "the server failed; its log says where", "kind": "server"}
    assert "/get_reward: ValueError at" in caplog.text, "what failed is told, and where"
    assert "in score" in caplog.text
    out, err = capfd.readouterr()
    assert SECRET not in caplog.text + out + err


def test_ready_means_a_score_lately(group: RewardGroup, config: MakeConfig, model: Path) -> None:
    now = [1000.0]
    settings = config(str(model))
    gated = Gated(group, settings)
    models = served_models(settings, gated, clock=lambda: now[0])

    async def run() -> list[bool]:
        gated.open.set()
        statuses = []
        for seconds in (0.0, 59.0, 2.0):
            now[0] += seconds
            statuses.append(await models.models[0].current.ready(60.0, 5.0))
        return statuses

    assert asyncio.run(run()) == [True, True, True]
    assert [request.token_ids for request in gated.scored] == [(0,), (0,)], "one forward a minute, not one a question"


def test_operators_learn_what_is_served(app: Callable[..., Starlette], group: RewardGroup, model: Path) -> None:
    served = app(max_items=7, max_body_bytes=1234)
    info = ask(served, lambda client: client.get("/info")).json()
    sentence = info["reads"]["sentence"]
    assert sentence.startswith(
        f"reads conversations, written by its chat template, scored at {EOS!r}, the end of the answer ("
    )
    reads = {
        "forms": ["conversation"], "scored_token": "end", "end_token": EOS, "template_variables": {}, "recorded": False,
        "sentence": sentence,
    }  # fmt: skip
    described = {
        "model": str(model), "revision": None, "dtype": "fp32", "mean": MEAN, "std": STD, "version": "1", "name": "reward",
        **{part: group.describe().result()[part] for part in ("fingerprint", "template")}, "max_tokens": LIMIT,
        "reads": reads,
    }  # fmt: skip
    of_tei = {name: info.pop(name) for name in (*TEI_KEYS, "model_type")}
    assert (of_tei["model_id"], of_tei["max_input_length"]) == (str(model), LIMIT)
    assert of_tei["model_type"]["classifier"]["id2label"] == {"0": "LABEL_0"}
    assert info == {
        **described, "models": [described], "normalize": False, "limits": {"items": 7, "body_bytes": 1234},
        "activation": "raw scores unless use_activation is true",
    }  # fmt: skip
    (row, alias) = ask(served, lambda client: client.get("/v1/models")).json()["data"]
    assert {row["id"], alias["id"]} == {"reward", str(model)}
    assert row["max_model_len"] == LIMIT
    response = post(served, "/v1/reward", {"items": [{"text": "abc"}, {"text": ""}]})
    post(served, "/v1/reward", {})
    metrics = ask(served, lambda client: client.get("/metrics"))
    assert metrics.headers["content-type"].startswith("text/plain")
    lines = metrics.text.splitlines()
    assert 'rlhf_scoring_requests_total{protocol="reward",status="200"} 1.0' in lines
    assert 'rlhf_scoring_requests_total{protocol="reward",status="422"} 1.0' in lines
    for name, value in {"forwards_total": 1, "items_total": 2, "tokens_total": 3}.items():
        assert f'rlhf_scoring_{name}{{model="reward"}} {value}.0' in lines
    for line in ("waiting_items 0.0", 'errors_total{kind="wrong_body"} 1.0', 'failed_items_total{fault="item"} 1.0'):
        assert f"rlhf_scoring_{line}" in lines
    assert response.json()["model"] == str(model)
    exported = set(re.findall(r"^# TYPE rlhf_scoring_(\w+) (\w+)$", metrics.text, re.MULTILINE))
    registered = {(of_page(one), one.kind) for group in SERVICE_METRICS.values() for one in group.values()}
    assert {(name, kind) for name, kind in exported if not name.endswith("_created")} == registered


def of_page(metric: ServiceMetric) -> str:
    """What Prometheus' text calls it."""
    return f"{metric.name}_total" if metric.kind == "counter" else metric.name


def test_a_request_id_is_given_back_or_made(app: Callable[..., Starlette]) -> None:
    served = app()

    async def work(client: httpx.AsyncClient) -> list[str]:
        responses = [
            await client.post("/v1/reward", json={"items": []}, headers=headers)
            for headers in ({"x-request-id": "mine"}, {}, {})
        ]
        return [response.json()["request_id"] for response in responses]

    own, generated, other = ask(served, work)
    assert own == "mine"
    assert generated != other and len(generated) == 32


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_the_open_routes_answer_without_a_body(app: Callable[..., Starlette], path: str) -> None:
    response = ask(app(), lambda client: client.get(path))
    assert (response.status_code, response.content) == (200, b"")
