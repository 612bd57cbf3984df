"""An answer holds finite numbers or an error, in the order of the items, whatever else is scored with them; overload is
answered at once; a caller that went away costs nothing more; texts reach no log. All over a real reward worker.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.applications import Starlette

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.reward_worker import RewardSetup, RewardWorker
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.backend import GroupBackend

from .reward_models import BOS, EOS, MEAN, STD, Reference, save_reward_model
from .services import served_models, service

get_logger()  # set up before pytest looks where to listen
MakeConfig = Callable[..., ServeConfig]
LIMIT = 200
TEXTS = [f"{BOS}why? because.{EOS}", "  no special tokens, spaces kept  ", f"ünï\n{EOS}", "a", f"{EOS}", "x" * LIMIT]
SECRET = "my-secret-text"
TEI_KEYS = (
    "model_id", "model_sha", "model_dtype", "max_input_length", "max_batch_tokens", "max_client_batch_size",
    "max_concurrent_requests", "max_batch_requests", "tokenization_workers", "sha", "docker_label",
)  # fmt: skip
"""What clients of text-embeddings-inference look for."""


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(path: Path, config: MakeConfig) -> RewardGroup:
    """A reward model, loaded as a rank of a group loads it."""
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    setup = RewardSetup(config(str(path)).reward, seed=0, max_tokens=256, max_item_tokens=LIMIT)
    group.setup(setup, timeout_s=60.0).result()
    return group


def backend_of(group: RewardGroup, config: ServeConfig) -> GroupBackend:
    """The group as a gateway puts it behind the app."""
    return GroupBackend(group, config.reward.model, normalize=config.normalize)


@pytest.fixture(scope="module")
def groups() -> dict[Path, RewardGroup]:
    return {}


@pytest.fixture
def group(model: Path, config: MakeConfig, groups: dict[Path, RewardGroup]) -> RewardGroup:
    """The reward model's only rank, in this process; loaded once."""
    if model not in groups:
        groups[model] = load(model, config)
    return groups[model]


@pytest.fixture
def app(group: RewardGroup, config: MakeConfig, model: Path) -> Callable[..., Starlette]:
    """``app(max_items=3, ...)``: the scoring app over the group."""

    def make(**values: object) -> Starlette:
        settings = config(str(model), **values)
        return service(settings, backend_of(group, settings))

    return make


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


def ask(app: Starlette, work: Ask) -> Any:
    """What ``work`` returns for a client of ``app``."""

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await asyncio.wait_for(work(client), timeout=30)

    return asyncio.run(run())


def post(app: Starlette, path: str, body: Any) -> httpx.Response:
    return ask(app, lambda client: client.post(path, content=json.dumps(body)))


def items(app: Starlette, *items: Any) -> list[dict[str, Any]]:
    """The results of ``/v1/reward``."""
    response = post(app, "/v1/reward", {"items": list(items)})
    assert response.status_code == 200, response.text
    return response.json()["results"]


def close(number: float) -> Any:
    return pytest.approx(number, rel=0, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------- scores


def random_ids(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 259) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


def test_ids_score_over_http_as_in_ppo_and_in_transformers(
    app: Callable[..., Starlette], group: RewardGroup, reference: Reference
) -> None:
    sequences = random_ids(20)
    results = items(app(), *({"token_ids": ids} for ids in sequences))
    assert [result["raw"] for result in results] == [close(reference.of_ids(ids)) for ids in sequences]
    in_ppo = group.score([ScoreRequest(token_ids=tuple(ids)) for ids in sequences]).result()
    assert [result["raw"] for result in results] == [close(result.raw) for result in in_ppo]
    assert [result["tokens"] for result in results] == [len(ids) for ids in sequences]
    assert len({result["raw"] for result in results}) == 20, "scores that are all alike would prove nothing"


@pytest.mark.parametrize(
    "beside", [{}, {"prompts": TEXTS, "metadata": [{}] * len(TEXTS)}, {"prompts": TEXTS, "labels": [None] * len(TEXTS)}]
)
def test_texts_score_over_http_as_in_ppo_and_in_transformers(
    app: Callable[..., Starlette], group: RewardGroup, reference: Reference, beside: dict[str, Any]
) -> None:
    response = post(app(), "/get_reward", {"query": TEXTS, **beside})
    assert response.status_code == 200
    answer = response.json()
    assert answer == {"rewards": answer["rewards"], "scores": answer["rewards"], "extra_logs": {}}
    assert answer["rewards"] == [close(reference.of_text(text)) for text in TEXTS]
    in_ppo = group.score([ScoreRequest(text=text) for text in TEXTS]).result()
    assert answer["rewards"] == [close(result.raw) for result in in_ppo]
    assert len(set(answer["rewards"])) == len(TEXTS)


def test_a_prompt_with_its_response_scores_over_http_as_in_ppo(
    app: Callable[..., Starlette], group: RewardGroup, reference: Reference
) -> None:
    pair = {"prompt": "why? ", "response": "because."}
    turns = [{"role": "user", "content": "why? "}, {"role": "assistant", "content": "because."}]
    by_pair, by_turns = items(app(), pair, {"messages": turns})
    written = f"{BOS}[user]why? {EOS}[assistant]because.{EOS}"
    assert [by_pair["raw"], by_turns["raw"]] == [close(reference.of_text(written))] * 2
    (in_ppo,) = group.score([ScoreRequest(**pair)]).result()
    assert by_pair["raw"] == close(in_ppo.raw)


def test_a_score_does_not_depend_on_the_company(app: Callable[..., Starlette]) -> None:
    served, sequences = app(), random_ids(24, seed=1)
    alone = [items(served, {"token_ids": ids})[0]["raw"] for ids in sequences]
    together = [result["raw"] for result in items(served, *({"token_ids": ids} for ids in sequences))]

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [{"items": [{"token_ids": ids}]} for ids in sequences]
        return await asyncio.gather(*(client.post("/v1/reward", json=body) for body in bodies))

    at_once = [response.json()["results"][0]["raw"] for response in ask(served, crowd)]
    assert together == [close(score) for score in alone]
    assert at_once == [close(score) for score in alone]


def test_normalised_rewards_come_beside_raw_scores_and_only_where_asked_for_instead(
    app: Callable[..., Starlette],
) -> None:
    (result,) = items(app(), {"text": "abc"})
    assert result["reward"] == close((result["raw"] - MEAN) / STD) != close(result["raw"])
    body = {"query": ["abc"]}
    assert post(app(), "/get_reward", body).json()["rewards"] == [result["raw"]]
    assert post(app(normalize=True), "/get_reward", body).json()["rewards"] == [result["reward"]]


@pytest.mark.parametrize(
    "statistics", [{}, {"mean": 0.0}, {"mean": 1.0, "std": 0.0}, {"mean": 1.0, "std": -1.0}], ids=str
)
def test_normalising_needs_statistics(tmp_path: Path, config: MakeConfig, statistics: dict[str, float]) -> None:
    path = save_reward_model(tmp_path, statistics=statistics)
    group = load(path, config)
    with pytest.raises(RequestError, match="holds no mean with a std above 0"):
        backend_of(group, config(str(path), normalize=True))
    settings = config(str(path))
    (result,) = items(service(settings, backend_of(group, settings)), {"text": "abc"})
    assert result["reward"] == result["raw"] is not None


# ---------------------------------------------------------------------------------------------------------------- errors


def test_a_bad_item_fails_alone(app: Callable[..., Starlette], reference: Reference) -> None:
    bad = [{"token_ids": [3, 999]}, {"text": ""}, {"text": "x" * (LIMIT + 1)}, {"text": 5}, "x", {"text": "\ud800"}]
    good = {"text": "abc"}
    sent = [good, *(item for wrong in bad for item in (wrong, good))]
    results = items(app(), *sent)
    assert len(results) == len(sent)
    for item, result in zip(sent, results, strict=True):
        if item is good:
            assert result["raw"] == close(reference.of_text("abc")) and result["error"] is None
        else:
            assert (result["raw"], result["reward"], result["fault"]) == (None, None, "item")
            assert result["error"]


def test_the_first_rank_alone_tells_what_is_wrong_with_an_item(
    group: RewardGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(group.ranks, InProcessRanks)
    bad = [ScoreRequest(text="")]
    assert [position for position, _ in group.ranks.worker.score(bad)] == [0]
    monkeypatch.setattr(group.ranks.worker, "rank", 1)
    assert group.ranks.worker.score(bad) == []


def test_openrlhfs_answer_has_a_number_for_every_query_or_none_at_all(app: Callable[..., Starlette]) -> None:
    response = post(app(), "/get_reward", {"query": ["abc", "x" * (LIMIT + 1)]})
    assert response.status_code == 422
    assert response.json()["error"].startswith(f"item 1: the item has {LIMIT + 1} tokens, the limit is {LIMIT}")
    assert post(app(), "/get_reward", {"query": []}).json() == {"rewards": [], "scores": [], "extra_logs": {}}


def test_truncation_is_asked_for_told_and_keeps_the_end(app: Callable[..., Starlette], reference: Reference) -> None:
    text = "abc" * LIMIT
    (result,) = items(app(), {"text": text, "truncate": True})
    assert (result["truncated"], result["tokens"]) == (True, LIMIT)
    assert result["raw"] == close(reference.of_text(text[-LIMIT:]))


def test_an_item_may_be_no_longer_than_the_model_reads(tmp_path: Path, config: MakeConfig) -> None:
    path = save_reward_model(tmp_path, positions=16)
    group = load(path, config)
    assert group.describe().result()["max_tokens"] == 16
    short, long = group.score([ScoreRequest(text="x" * 16), ScoreRequest(text="x" * 17)]).result()
    assert short.error is None
    assert "the limit is 16" in str(long.error)


def test_a_model_that_returns_no_number_gives_an_error_never_nan(tmp_path: Path, config: MakeConfig) -> None:
    path = save_reward_model(tmp_path, nan=True)
    settings = config(str(path))
    broken = service(settings, backend_of(load(path, config), settings))
    single = post(broken, "/get_reward", {"query": ["abc"]})
    assert single.status_code == 500
    assert single.json() == {"error": "item 0: the model returned nan, which is not a finite reward", "kind": "model"}
    batch = post(broken, "/v1/reward", {"items": [{"text": "abc"}]})
    (result,) = json.loads(batch.text, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))["results"]
    assert (result["raw"], result["reward"], result["fault"]) == (None, None, "model")
    assert ask(broken, lambda client: client.get("/ready")).status_code == 503
    assert ask(broken, lambda client: client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/get_reward", {"query": ["a"] * 4}, 413, "4 items in one request, the limit is 3"),
        ("/v1/reward", {"items": [{"text": "a"}] * 4}, 413, "4 items in one request, the limit is 3"),
        ("/get_reward", {"query": ["x" * 2000]}, 413, "the body is larger than 1000 bytes"),
        ("/v1/reward", {"query": ["a"]}, 422, "items must be a list"),
        ("/get_reward", {"text": "a"}, 422, "query must be a list"),
    ],
)
def test_what_is_beyond_the_limits_is_refused(
    app: Callable[..., Starlette], path: str, body: Any, status: int, error: str
) -> None:
    response = post(app(max_items=3, max_body_bytes=1000), path, body)
    assert response.status_code == status
    assert error in response.json()["error"]


def test_a_request_larger_than_the_queue_is_told_so(app: Callable[..., Starlette]) -> None:
    response = post(app(max_items=10, max_queue_items=3), "/get_reward", {"query": ["a"] * 4})
    assert (response.status_code, "the limit is 3" in response.text) == (413, True)


def test_a_dead_group_is_told_as_such_and_asked_again_later(model: Path, config: MakeConfig) -> None:
    group, settings = load(model, config), config(str(model), hold_s=0.0)
    served = service(settings, backend_of(group, settings))
    group.stop()
    response = post(served, "/get_reward", {"query": ["abc"]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json() == {"error": "the reward group failed in score", "kind": "source"}
    assert ask(served, lambda client: client.get("/ready")).status_code == 503


# --------------------------------------------------------------------------------------------------------- load and leaving


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


# -------------------------------------------------------------------------------------------------------------- operating


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
            statuses.append(await models.models[0].ready(60.0))
        return statuses

    assert asyncio.run(run()) == [True, True, True]
    assert [request.token_ids for request in gated.scored] == [(0,), (0,)], "one forward a minute, not one a question"


def test_operators_learn_what_is_served(app: Callable[..., Starlette], group: RewardGroup, model: Path) -> None:
    served = app(max_items=7, max_body_bytes=1234)
    info = ask(served, lambda client: client.get("/info")).json()
    described = {
        "model": str(model), "revision": None, "dtype": "fp32", "mean": MEAN, "std": STD, "version": "1", "name": "reward",
        **{part: group.describe().result()[part] for part in ("fingerprint", "template")}, "max_tokens": LIMIT,
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
