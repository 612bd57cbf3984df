"""An answer holds finite numbers or an error, in the order of the items, whatever else is scored with them. All over a real
reward worker.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest

from .reward_models import BOS, EOS, MEAN, STD, Reference, save_reward_model
from .served_model import LIMIT, MakeConfig, ask, backend_of, close, items, load, post
from .services import service

pytestmark = pytest.mark.usefixtures("torch_threads")
TEXTS = [f"{BOS}why? because.{EOS}", "  no special tokens, spaces kept  ", f"ünï\n{EOS}", "a", f"{EOS}", "x" * LIMIT]


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
