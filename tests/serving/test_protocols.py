"""Every protocol is a translation: a body becomes the items that its clients mean, their scores the answer they read; what
would change a score and is not served is refused, in the protocol's own form; no text stands in a refusal.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.applications import Starlette

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.protocols.openapi import OPERATING
from rlhf_ray.serving.protocols.registry import PROTOCOLS
from rlhf_ray.serving.protocols.requests import sigmoid
from rlhf_ray.serving.refusals import KINDS

from .services import Lengths, service

SECRET = "my-secret-text"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
VARYING_KEYS = {"id", "created", "request_id"}
"""What is different in every answer."""


@pytest.fixture
def backend() -> Lengths:
    return Lengths()


@pytest.fixture
def app(config: Callable[..., ServeConfig], backend: Lengths) -> Starlette:
    return service(config(max_items=5), backend)


def post(app: Starlette, path: str, body: Any, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=json.dumps(body), headers=headers)

    return asyncio.run(ask())


def get(app: Starlette, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


def schema_of(app: Starlette, path: str) -> dict[str, Any]:
    described = get(app, "/openapi.json").json()
    operation = described["paths"][path]["post"]
    schema: dict[str, Any] = operation["responses"]["200"]["content"]["application/json"]["schema"]
    return schema


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def listing(rows: list[Any], tokens: int, model: str = "lengths") -> dict[str, Any]:
    return {"object": "list", "model": model, "data": rows, "usage": usage(tokens)}


def classified(*scores: float) -> list[Any]:
    return [{"index": i, "label": "LABEL_0", "probs": [score], "num_classes": 1} for i, score in enumerate(scores)]


def embedded(*values: Any) -> list[Any]:
    return [{"index": i, "object": "embedding", "embedding": value} for i, value in enumerate(values)]


def text(content: str, **options: Any) -> ScoreRequest:
    return ScoreRequest(text=content, add_special_tokens=True, **options)


def pair(prompt: str, response: str, **options: Any) -> ScoreRequest:
    return ScoreRequest(prompt=prompt, response=response, **options)


LITTLE, BIG = (base64.b64encode(struct.pack(form, 3.0)).decode() for form in ("<f", ">f"))
CHAT = ScoreRequest(messages=tuple(TURNS))
CALLED = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
    {"role": "tool", "content": "nine"},
    {"role": "assistant", "content": "ab"},
]
PLAIN = ({"role": "user", "content": "a\nb"}, {**CALLED[1], "content": ""}, *CALLED[2:])
"""What training makes of the same messages."""
OPENRLHF = {"rewards": [3.0, 1.0], "scores": [3.0, 1.0], "extra_logs": {}}
EXCHANGES: list[tuple[str, str, dict[str, Any], list[ScoreRequest], Any]] = [
    ("openrlhf, first", "/get_reward", {"query": ["abc", "d"]},
     [ScoreRequest(text="abc"), ScoreRequest(text="d")], OPENRLHF),
    ("openrlhf, metadata", "/get_reward", {"query": ["abc", "d"], "prompts": ["a", ""], "metadata": [{}, {}]},
     [ScoreRequest(text="abc"), ScoreRequest(text="d")], OPENRLHF),
    ("openrlhf, labels", "/get_reward", {"query": ["abc", "d"], "prompts": ["a", ""], "labels": ["x", None]},
     [ScoreRequest(text="abc"), ScoreRequest(text="d")], OPENRLHF),
    ("verl with vLLM", "/classify", {"model": "lengths", "input": "abc", "activation": False},
     [text("abc")], listing(classified(3.0), 3)),
    ("verl 0.9 with vLLM", "/classify", {"model": "lengths", "input": "abc", "use_activation": False},
     [text("abc")], listing(classified(3.0), 3)),
    ("verl with SGLang", "/v1/embeddings", {"model": "lengths", "input": "abc"}, [text("abc")], listing(embedded([3.0]), 3)),
    ("vLLM, activation", "/classify", {"input": ["abc", "d"], "use_activation": True},
     [text("abc"), text("d")], listing(classified(sigmoid(3.0), sigmoid(1.0)), 4)),
    ("vLLM, ids", "/v1/classify", {"input": [1, 2, 3]}, [ScoreRequest(token_ids=(1, 2, 3))], listing(classified(3.0), 3)),
    ("vLLM, lists of ids", "/classify", {"input": [[1], [2, 3]]},
     [ScoreRequest(token_ids=(1,)), ScoreRequest(token_ids=(2, 3))], listing(classified(1.0, 2.0), 3)),
    ("vLLM, chat with a call", "/classify",
     {"messages": CALLED, "tools": [{"name": "clock", "x": None}], "chat_template_kwargs": {"enable_thinking": False}},
     [ScoreRequest(messages=PLAIN, tools=({"name": "clock"},), chat_template_kwargs={"enable_thinking": False})],
     listing(classified(14.0), 14)),
    ("slime, tools", "/rm", {"prompt": CALLED[:3], "response": "ab", "tools": [{"name": "clock"}]},
     [ScoreRequest(messages=(*PLAIN[:3], {"role": "assistant", "content": "ab"}), tools=({"name": "clock"},))], 14.0),
    ("vLLM, chat", "/classify", {"messages": TURNS, "softmax": False}, [CHAT], listing(classified(4.0), 4)),
    ("vLLM, as it stands", "/classify", {"input": "abc", "add_special_tokens": False, "truncate_prompt_tokens": -1},
     [ScoreRequest(text="abc", truncate=True)], listing(classified(3.0), 3)),
    ("vLLM, pooling", "/pooling", {"input": "abc", "task": "classify"}, [text("abc")],
     listing([{"index": 0, "object": "pooling", "data": [3.0]}], 3)),
    ("vLLM, pooling in base64", "/pooling", {"input": "abc", "encoding_format": "base64", "endianness": "big"}, [text("abc")],
     listing([{"index": 0, "object": "pooling", "data": BIG}], 3)),
    ("openai's client", "/v1/embeddings", {"input": ["abc"], "model": "reward", "encoding_format": "base64"},
     [text("abc")], listing(embedded(LITTLE), 3, "reward")),
    ("vLLM, score one to many", "/score", {"text_1": "a", "text_2": ["b", "cd"]}, [pair("a", "b"), pair("a", "cd")],
     listing([{"index": 0, "object": "score", "score": 2.0}, {"index": 1, "object": "score", "score": 3.0}], 5)),
    ("vLLM, score by queries", "/v1/score", {"queries": ["a", "bb"], "documents": ["b", "cd"]},
     [pair("a", "b"), pair("bb", "cd")],
     listing([{"index": 0, "object": "score", "score": 2.0}, {"index": 1, "object": "score", "score": 4.0}], 6)),
    ("Jina's rerank", "/v1/rerank", {"model": "reward", "query": "a", "documents": ["b", "cdef", "cd"], "top_n": 2},
     [pair("a", "b"), pair("a", "cdef"), pair("a", "cd")],
     {"model": "reward", "usage": {"prompt_tokens": 10, "total_tokens": 10},
      "results": [{"index": 1, "document": {"text": "cdef"}, "relevance_score": 5.0},
                  {"index": 2, "document": {"text": "cd"}, "relevance_score": 3.0}]}),
    ("Cohere's rerank", "/v2/rerank", {"query": "a", "documents": [{"text": "b"}, {"text": "cd"}], "return_documents": False},
     [pair("a", "b"), pair("a", "cd")],
     {"model": "lengths", "usage": {"prompt_tokens": 5, "total_tokens": 5},
      "results": [{"index": 1, "relevance_score": 3.0}, {"index": 0, "relevance_score": 2.0}]}),
    ("TEI's rerank", "/rerank", {"query": "a", "texts": ["b", "cd"], "return_text": True, "raw_scores": True},
     [pair("a", "b"), pair("a", "cd")],
     [{"index": 1, "score": 3.0, "text": "cd"}, {"index": 0, "score": 2.0, "text": "b"}]),
    ("vLLM's rerank at the same path", "/rerank", {"query": "a", "documents": ["b"]}, [pair("a", "b")],
     {"model": "lengths", "usage": {"prompt_tokens": 2, "total_tokens": 2},
      "results": [{"index": 0, "document": {"text": "b"}, "relevance_score": 2.0}]}),
    ("TEI's predict", "/predict", {"inputs": "abc"}, [text("abc")], [{"score": 3.0, "label": "LABEL_0"}]),
    ("TEI's predict of a pair", "/predict", {"inputs": ["a", "bc"], "raw_scores": False}, [pair("a", "bc")],
     [{"score": sigmoid(3.0), "label": "LABEL_0"}]),
    ("TEI's predict of many", "/predict", {"inputs": [["abc"], ["a", "b"]], "truncate": True, "truncation_direction": "Left"},
     [text("abc", truncate=True), pair("a", "b", truncate=True)],
     [[{"score": 3.0, "label": "LABEL_0"}], [{"score": 2.0, "label": "LABEL_0"}]]),
    ("slime", "/rm", {"prompt": "ab", "response": "cd", "label": "x"}, [ScoreRequest(text="abcd")], 4.0),
    ("slime, chat", "/rm", {"prompt": TURNS[:1], "response": "bcd", "label": None}, [CHAT], 4.0),
    ("nothing at all", "/get_reward", {"query": []}, [], {"rewards": [], "scores": [], "extra_logs": {}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "items", "answer"), [row[1:] for row in EXCHANGES], ids=[row[0] for row in EXCHANGES]
)
def test_a_recorded_request_is_scored_as_its_client_means_it(
    app: Starlette, backend: Lengths, path: str, body: Any, items: list[ScoreRequest], answer: Any
) -> None:
    response = post(app, path, body)
    assert response.status_code == 200, response.text
    assert [request for batch in backend.batches for request in batch] == items
    content = response.json()
    jsonschema.validate(content, schema_of(app, path))
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in VARYING_KEYS or name in answer}
    assert content == answer


def test_the_native_protocol_reads_every_representation_and_a_bad_item_fails_alone(
    app: Starlette, backend: Lengths
) -> None:
    items = [{"token_ids": [1, 2]}, {"text": SECRET, "bad": 1}, {"prompt": "a", "response": "b"}, {"text": ""}]
    items.append({"messages": [{"role": "user", "content": SECRET, "\ud800": 1}]})
    response = post(app, "/v1/reward", {"items": items, "model": "reward"}, **{"x-request-id": "mine"})
    answer = response.json()
    jsonschema.validate(answer, schema_of(app, "/v1/reward"))
    assert (answer["request_id"], answer["model"], answer["version"]) == ("mine", "reward", "1")
    assert [result["raw"] for result in answer["results"]] == [2.0, None, 2.0, None, None]
    assert [result["fault"] for result in answer["results"]] == [None, "item", None, "item", "item"]
    assert SECRET not in response.text
    assert response.headers["x-request-id"] == "mine" and response.headers["x-model-version"] == "1"


def test_the_native_protocol_reads_a_conversation_with_all_that_its_template_reads(
    app: Starlette, backend: Lengths
) -> None:
    variables = {"enable_thinking": False}
    items = [
        {"messages": CALLED, "tools": [{"name": "clock"}], "chat_template_kwargs": variables},
        {"prompt": "a", "response": "b", "chat_template_kwargs": variables},
        {"text": "a", "tools": [{"name": SECRET}]},
        {"messages": CALLED, "tools": {SECRET: 1}},
        {"messages": CALLED, "chat_template_kwargs": {"tools": SECRET}},
    ]
    response = post(app, "/v1/reward", {"items": items})
    results = response.json()["results"]
    assert [result["fault"] for result in results] == [None, None, "item", "item", "item"]
    assert backend.batches == [
        [
            ScoreRequest(messages=PLAIN, tools=({"name": "clock"},), chat_template_kwargs=variables),
            ScoreRequest(prompt="a", response="b", chat_template_kwargs=variables),
        ]
    ]
    assert SECRET not in response.text


REFUSED = [
    ("/get_reward", {"query": SECRET}, 422, "wrong_body", "query must be a list of texts, not str"),
    ("/get_reward", {"query": ["a", 1]}, 422, "wrong_body", "query 1 must be a text, not int"),
    ("/get_reward", {"query": [f"{SECRET}\ud800"]}, 422, "item", "half of a surrogate pair"),
    ("/get_reward", {"query": ["a", ""]}, 422, "item", "item 1: the item is empty"),
    ("/get_reward", {"query": ["a"] * 6}, 413, "too_many_items", "6 items in one request, the limit is 5"),
    ("/v1/reward", {"items": {SECRET: 1}}, 422, "wrong_body", "items must be a list, not dict"),
    ("/v1/reward", {"items": [], "model": SECRET}, 404, "unknown_model", "no such model is served here: lengths, reward"),
    ("/classify", {}, 422, "wrong_body", "input must be a text, texts, token ids or lists of them, not nothing"),
    ("/classify", {"input": [[1], SECRET, 2.5]}, 422, "wrong_body", "input 2 must be a text or token ids, not float"),
    ("/classify", {"input": "a", "messages": TURNS}, 422, "wrong_body", "not both"),
    ("/classify", {"messages": [{"role": SECRET}]}, 422, "item",
     "message 1 must have a text under 'content', or 'tool_calls', this is nothing"),
    ("/classify", {"messages": [{"role": "user", "content": 5}]}, 422, "wrong_body",
     "messages 0 content must be a text, parts of text, or null beside tool_calls, not int"),
    ("/classify", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]},
     422, "item", "a list with parts of the kind 'image_url': only parts of text are read"),
    ("/pooling", {"messages": [{"role": "user", "content": [SECRET]}]}, 422, "wrong_body", "must be"),
    ("/classify", {"messages": TURNS, "tools": SECRET}, 422, "wrong_body", "tools must be a list of objects, not str"),
    ("/classify", {"messages": TURNS, "tools": [SECRET]}, 422, "wrong_body", "tools 0 must be an object, not str"),
    ("/classify", {"messages": TURNS, "chat_template_kwargs": {"chat_template": SECRET}}, 422, "item",
     "not the template's own: chat_template"),
    ("/classify", {"input": "a", "tools": [{"name": SECRET}]}, 422, "unsupported", "tools is for messages"),
    ("/classify", {"input": "a", "chat_template_kwargs": {SECRET: 1}}, 422, "unsupported", "is for messages"),
    ("/score", {"text_1": "a", "text_2": "b", "chat_template_kwargs": {SECRET: 1}}, 422, "unsupported", "is not served"),
    ("/rm", {"prompt": "a", "response": "b", "tools": [{"name": SECRET}]}, 422, "unsupported", "that is a conversation"),
    ("/classify", {"messages": [{"role": "user", "content": "a", f"{SECRET}\ud800": 1}]}, 422, "wrong_body",
     "messages 0 has a key that holds half of a surrogate pair"),
    ("/classify", {"messages": SECRET}, 422, "wrong_body", "messages must be a list of objects with the texts role"),
    ("/classify", {"input": "a", "activation": True, "softmax": False}, 422, "wrong_body", "say different things"),
    ("/classify", {"input": "a", "activation": "no"}, 422, "wrong_body", "activation must be true or false, not str"),
    ("/classify", {"input": "a", "truncate_prompt_tokens": 5}, 422, "unsupported", "-1 only"),
    ("/classify", {"input": "a", "truncate_prompt_tokens": True}, 422, "wrong_body", "must be a whole number, not bool"),
    ("/classify", {"input": "a", "truncate_prompt_tokens": -1, "truncation_side": "right"}, 422, "unsupported", "left only"),
    ("/classify", {"input": "a", "chat_template": SECRET}, 422, "unsupported", "chat_template is not served"),
    ("/classify", {"messages": TURNS, "add_generation_prompt": True}, 422, "unsupported", "its last answer"),
    ("/pooling", {"input": "a", "task": "token_classify"}, 422, "unsupported", "one score a sequence"),
    ("/pooling", {"input": "a", "embed_dtype": "float16"}, 422, "unsupported", "float32 only"),
    ("/pooling", {"input": "a", "encoding_format": "bytes"}, 422, "unsupported", "float and base64"),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, 422, "unsupported", "the score is the whole embedding"),
    ("/v1/embeddings", {"input": "a", "model": 5}, 422, "wrong_body", "model must be a text, not int"),
    ("/score", {"text_1": "a"}, 422, "wrong_body", "give text_1 and text_2, or queries and documents"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 422, "wrong_body", "2 texts and text_2 3"),
    ("/score", {"text_1": 1, "text_2": "a"}, 422, "wrong_body", "text_1 must be a text or a list of texts, not int"),
    ("/v1/rerank", {"query": ["a"], "documents": ["a"]}, 422, "wrong_body", "query must be a text, not list"),
    ("/v1/rerank", {"query": "a", "documents": [{"txt": SECRET}]}, 422, "wrong_body", "documents 0 must be a text"),
    ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, 422, "wrong_body", "top_n must be 0"),
    ("/rerank", {"query": "a", "texts": "a"}, 422, "wrong_body", "texts must be a list of texts, not str"),
    ("/predict", {"inputs": 5}, 422, "wrong_body", "inputs must be a text, a pair of texts"),
    ("/predict", {"inputs": ["a", "b", "c"]}, 422, "wrong_body", "one text or a pair, not 3 of them"),
    ("/predict", {"inputs": [["a"], []]}, 422, "wrong_body", "one text or a pair, not 0 of them"),
    ("/predict", {"inputs": "a", "truncate": True, "truncation_direction": "Right"}, 422, "unsupported", "left only"),
    ("/rm", {"prompt": "a"}, 422, "wrong_body", "response must be a text, not nothing"),
    ("/rm", {"prompt": 5, "response": "a"}, 422, "wrong_body", "prompt must be a text or a conversation, not int"),
    ("/rm", {"prompt": ["a"], "response": "a"}, 422, "wrong_body", "prompt 0 must be an object, not str"),
    ("/rm", {"prompt": "", "response": ""}, 422, "item", "item 0: the item is empty"),
]  # fmt: skip


def kind_and_sentence(answer: Any) -> tuple[str, str]:
    """What a refusal says, in whichever of the three forms."""
    if isinstance(answer["error"], dict):
        return answer["error"]["type"], answer["error"]["message"]
    return answer["kind"], answer["error"]


@pytest.mark.parametrize(("path", "body", "status", "kind", "sentence"), REFUSED)
def test_a_refusal_has_a_status_a_kind_and_a_sentence_without_texts(
    app: Starlette, path: str, body: Any, status: int, kind: str, sentence: str
) -> None:
    response = post(app, path, body)
    assert (response.status_code, kind_and_sentence(response.json())[0]) == (status, kind)
    assert sentence in kind_and_sentence(response.json())[1]
    assert SECRET not in response.text


REPEATED = [
    ("/v1/rerank", {"query": "{}", "documents": ["b"] * 4}),
    ("/rerank", {"query": "{}", "texts": ["b"] * 4}),
    ("/score", {"text_1": "{}", "text_2": ["b"] * 4}),
    ("/v1/score", {"queries": ["{}"], "documents": ["b"] * 4}),
]


@pytest.mark.parametrize(("path", "body"), REPEATED, ids=[path for path, _ in REPEATED])
def test_a_text_that_is_part_of_many_items_counts_as_often(
    app: Starlette, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query of seven megabytes beside a thousand documents is a body of seven gigabytes to whoever reads its items."""
    monkeypatch.setattr("rlhf_ray.serving.protocols.fields.MOST_REPEATED", 1000)
    for length, status in ((250, 200), (251, 413)):
        asked = {key: ["x" * length] if value == ["{}"] else value for key, value in body.items()}
        asked = {key: "x" * length if value == "{}" else value for key, value in asked.items()}
        response = post(app, path, asked)
        assert response.status_code == status, response.text
    assert "is part of 4 items, 1004 in all, and the limit is 1000" in kind_and_sentence(response.json())[1]


def test_text_embeddings_inference_names_its_error_types(app: Starlette) -> None:
    assert post(app, "/predict", {"inputs": 5}).json()["error_type"] == "Validation"
    assert post(app, "/predict", {"inputs": ""}).json()["error_type"] == "Tokenizer"


def test_an_identity_that_is_no_plain_name_is_not_given_back(app: Starlette) -> None:
    body = {"input": "a", "request_id": "mine-1"}
    assert post(app, "/classify", body).json()["id"] == "classify-mine-1"
    for bad in ("a\nb", "<script>", "x" * 200):
        answer = post(app, "/classify", {**body, "request_id": bad})
        assert bad not in answer.text and len(answer.json()["id"]) == len("classify-") + 32


def test_no_other_route_and_no_other_method_answers(app: Starlette) -> None:
    assert (get(app, "/nothing").status_code, get(app, "/nothing").json()["kind"]) == (404, "not_found")
    refused = get(app, "/classify")
    assert (refused.status_code, refused.json()["kind"], refused.headers["allow"]) == (
        405,
        "method_not_allowed",
        "POST",
    )


def test_the_openapi_document_names_exactly_the_routes_and_every_example_works(app: Starlette) -> None:
    described = get(app, "/openapi.json").json()
    routes = {getattr(route, "path", None) for route in app.routes}
    assert set(described["paths"]) == routes == {path for one in PROTOCOLS for path in one.paths} | set(OPERATING)
    assert len([path for one in PROTOCOLS for path in one.paths]) == len(
        {path for one in PROTOCOLS for path in one.paths}
    )
    identities = [operation["operationId"] for methods in described["paths"].values() for operation in methods.values()]
    assert len(set(identities)) == len(identities)
    for path, methods in described["paths"].items():
        if "post" in methods:
            content = methods["post"]["requestBody"]["content"]["application/json"]
            jsonschema.validate(content["example"], content["schema"])
            answer = post(app, path, content["example"])
            assert answer.status_code == 200, answer.text
            jsonschema.validate(
                answer.json(), methods["post"]["responses"]["200"]["content"]["application/json"]["schema"]
            )
    page = get(app, "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert all(path in page.text for path in routes if path)
    assert "http" not in page.text.replace("HTTP", ""), "the page loads nothing from anywhere"


def test_every_status_of_a_refusal_is_documented(app: Starlette) -> None:
    documented = get(app, "/openapi.json").json()["paths"]["/classify"]["post"]["responses"]
    assert {str(status) for status, _ in KINDS.values()} - {"405"} <= set(documented)


@pytest.mark.parametrize("number", [-1000.0, -1.0, 0.0, 1.0, 1000.0])
def test_the_activation_is_the_sigmoid_without_overflow(number: float) -> None:
    reference = 0.5 * (1 + math.tanh(number / 2))
    assert sigmoid(number) == pytest.approx(reference, rel=0, abs=1e-15)


def test_truncation_is_told_in_a_header(config: Callable[..., ServeConfig]) -> None:
    class Cutting(Lengths):
        def result(self, request: ScoreRequest) -> Any:
            from dataclasses import replace

            return replace(super().result(request), truncated=request.truncate)

    app = service(config(), Cutting())
    assert (
        post(app, "/classify", {"input": ["a", "b"], "truncate_prompt_tokens": -1}).headers["x-truncated-items"] == "2"
    )
    assert "x-truncated-items" not in post(app, "/classify", {"input": "a"}).headers


def test_models_are_chosen_by_name_or_path(config: Callable[..., ServeConfig]) -> None:
    app = service(config(), Lengths("first"), Lengths("second", plus=100.0))
    named = {"reward": 1.0, "first": 1.0, "model-2": 101.0, "second": 101.0}
    for name, score in named.items():
        assert post(app, "/classify", {"input": "a", "model": name}).json()["data"][0]["probs"] == [score]
    assert post(app, "/get_reward", {"query": ["a"]}).json()["rewards"] == [1.0]
    refused = post(app, "/classify", {"input": "a", "model": "third"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "unknown_model")
    assert [row["id"] for row in get(app, "/v1/models").json()["data"]] == ["first", "reward", "model-2", "second"]
