"""A route that nobody thought of is closed; tokens are compared in constant time; only two routes are open."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from rlhf_ray.config.files.tokens import read_tokens
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import GroupError, RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving import auth
from rlhf_ray.serving.auth import (
    OPEN_ROUTES,
    PAGE_ROUTE,
    SECONDS_WITHOUT_TOKENS,
    RateLimit,
    TokenFile,
    presented_token,
    require_closed,
)
from rlhf_ray.serving.refusals import Refusal

from .services import Lengths, service

KEYS = {"first-token-of-two": "ppo", "second-token-of-two": "key 2"}
TOKENS = ("first-token-of-two", "second-token-of-two")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
COMMON_ROUTES = (
    "/",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/-/routes",
    "/-/healthz",
    "/v1/models",
    "/health/",
    "/ready/..",
)


class Down(Lengths):
    """A reward group that is gone."""

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        raise GroupError("reward", 0, "score", "its process died")


@pytest.fixture
def app(config: Callable[..., ServeConfig]) -> Starlette:
    return service(config(hold_s=0.0), Down(), keys=lambda: KEYS)


def statuses(app: Starlette, calls: Sequence[tuple[str, str]], headers: dict[str, str] | None = None) -> list[int]:
    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [(await client.request(method, path, headers=headers)).status_code for method, path in calls]

    return asyncio.run(ask())


def every_route(app: Starlette) -> list[str]:
    assert all(isinstance(route, Route) for route in app.routes), "walk what is mounted, too"
    return [route.path for route in app.routes if isinstance(route, Route)]


@pytest.mark.parametrize("page", [True, False])
def test_every_route_but_two_and_the_page_refuses_without_a_token(
    config: Callable[..., ServeConfig], page: bool
) -> None:
    app = service(config(hold_s=0.0, page=page), Down(), keys=lambda: KEYS)
    open_routes = {*OPEN_ROUTES, PAGE_ROUTE} if page else OPEN_ROUTES
    paths = [*every_route(app), *COMMON_ROUTES]
    assert {"/get_reward", "/v1/reward", "/info", "/metrics", *open_routes} <= set(paths)
    calls = [(method, path) for path in paths for method in METHODS]
    reached = ["/" if path.endswith("/..") else path for _, path in calls]  # the client resolves it
    is_open = [
        method in ("GET", "HEAD") and path in open_routes for (method, _), path in zip(calls, reached, strict=True)
    ]
    answered = statuses(app, calls)
    assert [(call, status) for call, status, open_ in zip(calls, answered, is_open, strict=True) if not open_] == [
        (call, 401) for call, open_ in zip(calls, is_open, strict=True) if not open_
    ]
    assert statuses(app, [("GET", "/health"), ("GET", "/ready")]) == [200, 503]


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("form", ["Bearer {}", "bearer  {}", "basic"])
def test_a_token_opens_as_bearer_and_as_password(app: Starlette, token: str, form: str) -> None:
    header = basic("x", token) if form == "basic" else form.format(token)
    calls = [("GET", "/info"), ("GET", "/metrics"), ("POST", "/get_reward"), ("GET", "/docs")]
    assert statuses(app, calls, {"authorization": header}) == [200, 200, 400, 200]


def test_a_client_that_only_knows_a_url_gives_the_token_in_it(app: Starlette) -> None:
    async def ask() -> int:
        url = f"http://x:{TOKENS[0]}@test/info"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return (await client.get(url)).status_code

    assert asyncio.run(ask()) == 200


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer ", "Basic", f"Bearer {TOKENS[0][:-1]}", f"Bearer {TOKENS[0]}x", f"Bearer {TOKENS[0].upper()}",
        f"Token {TOKENS[0]}", TOKENS[0], basic(TOKENS[0], ""), basic(TOKENS[0], "x"), f"Basic {TOKENS[0]}", "Basic !!!",
        f"Basic {base64.b64encode(TOKENS[0].encode()).decode()}", f"Bearer {TOKENS[0]},{TOKENS[1]}",
    ],
)  # fmt: skip
def test_anything_else_is_refused(app: Starlette, header: str) -> None:
    assert statuses(app, [("GET", "/info")], {"authorization": header} if header else {}) == [401]


@pytest.mark.parametrize("header", [b"Basic \xff\xfe", b"Bearer \xff\xfe", b"\xff"])
def test_a_header_that_is_no_text_is_refused(app: Starlette, header: bytes) -> None:
    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.get("/info", headers=[(b"authorization", header)])).status_code

    assert asyncio.run(ask()) == 401


def test_websockets_are_refused_too(app: Starlette) -> None:
    sent: list[Mapping[str, Any]] = []

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> Mapping[str, Any]:
        return {"type": "websocket.connect"}

    asyncio.run(app({"type": "websocket", "path": "/health", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_without_tokens_everything_is_open(config: Callable[..., ServeConfig]) -> None:
    assert statuses(service(config(hold_s=0.0), Down()), [("GET", "/info")]) == [200]


@pytest.mark.parametrize("token", [*TOKENS, "neither-of-the-two"])
def test_every_token_is_compared_in_constant_time(app: Starlette, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(sent: bytes, known: bytes) -> bool:
        compared.append((sent, known))
        return hmac.compare_digest(sent, known)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth, "hmac", Watched)
    statuses(app, [("GET", "/info")], {"authorization": f"Bearer {token}"})
    assert compared == [(token.encode(), known.encode()) for known in TOKENS]


def test_no_token_is_presented_where_there_is_none() -> None:
    assert presented_token("Negotiate abc") == b""


def test_tokens_are_read_one_a_line_with_or_without_a_name(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# ours\n{TOKENS[0]}\n\n  ppo:{TOKENS[1]}  \n")
    assert read_tokens(str(file)) == {TOKENS[0]: "key 1", TOKENS[1]: "ppo"}
    assert read_tokens(None) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no token in it"),
        ("# nothing\n", "there is no token in it"),
        (f"{TOKENS[0]}\nshort\n", "token 2 is shorter than 16 characters"),
        ("name:\n", "token 1 is shorter"),
        (b"\xff\xfe", "it is not a text of UTF-8"),
        (f"{TOKENS[0]}\n\nalice {TOKENS[1]}\n", "line 3: token 2 holds a space or a letter"),
        (f"bob:{TOKENS[1]}\u00fc\n", "line 1: token 1 holds a space or a letter"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_a_token_is_an_error_that_does_not_show_it(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError, match=message) as caught:
        read_tokens(str(file))
    assert TOKENS[0] not in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_another_address_needs_a_token(host: str) -> None:
    with pytest.raises(RequestError, match="give token_file"):
        require_closed(host, ())
    require_closed(host, TOKENS)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    require_closed(host, ())


@pytest.mark.parametrize("line", ["\ufeffalice:{}", "alice: {}", " alice :\t{} ", "\ufeff alice: {}\r"])
def test_a_mark_at_the_beginning_and_spaces_around_a_token_change_nothing(tmp_path: Path, line: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(f"{line.format(TOKENS[0])}\n".encode())
    assert read_tokens(str(file)) == {TOKENS[0]: "alice"}


class Clocked:
    """A file of tokens and the keys it opens as time goes on."""

    def __init__(self, file: Path, content: str) -> None:
        self.file, self.now = file, 0.0
        file.write_text(content)
        self.keys = TokenFile(str(file), clock=lambda: self.now)

    def after(self, seconds: float) -> Mapping[str, str]:
        self.now += seconds
        return dict(self.keys())


def test_a_changed_file_counts_line_by_line(tmp_path: Path, project_log: io.StringIO) -> None:
    clocked = Clocked(tmp_path / "tokens", f"a:{TOKENS[0]}\n")
    assert clocked.after(0.0) == {TOKENS[0]: "a"}
    clocked.file.write_text(f"a:{TOKENS[0]}\nbee:{TOKENS[1]}\n")
    assert clocked.after(1.0) == {TOKENS[0]: "a", TOKENS[1]: "bee"}, "old and new open while callers change over"
    clocked.file.write_text(f"a:short\nbee:{TOKENS[1]}\n")
    assert clocked.after(1.0) == {TOKENS[1]: "bee"}, "a bad line keeps no revoked token valid"
    assert "line 1: token 1 is shorter than 16 characters" in project_log.getvalue()
    assert not any(token in project_log.getvalue() for token in TOKENS)


@pytest.mark.parametrize("end", ["", "# nothing\n", "a:short\n", None])
def test_the_last_token_can_be_revoked_and_no_route_opens(
    tmp_path: Path, end: str | None, config: Callable[..., ServeConfig], project_log: io.StringIO
) -> None:
    clocked = Clocked(tmp_path / "tokens", f"a:{TOKENS[0]}\n")
    app = service(config(hold_s=0.0), Down(), keys=clocked.keys)
    info = [("GET", "/info")]
    if end is None:
        clocked.file.unlink()
    else:
        clocked.file.write_text(end)
    clocked.after(1.0)
    assert statuses(app, info, {"authorization": f"Bearer {TOKENS[0]}"}) == [200], "an editor may be writing it"
    assert "in 3 s every request is refused" in project_log.getvalue()
    clocked.after(SECONDS_WITHOUT_TOKENS)
    for headers in (
        {"authorization": f"Bearer {TOKENS[0]}"},
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer nobody"},
    ):
        assert statuses(app, info, headers) == [401]
    clocked.file.write_text(f"b:{TOKENS[1]}\n")
    clocked.after(1.0)
    assert statuses(app, info, {"authorization": f"Bearer {TOKENS[1]}"}) == [200]


def test_a_file_that_is_written_again_in_time_closes_nothing(tmp_path: Path) -> None:
    clocked = Clocked(tmp_path / "tokens", f"a:{TOKENS[0]}\n")
    clocked.file.unlink()
    assert clocked.after(1.0) == {TOKENS[0]: "a"}
    clocked.file.write_text(f"a:{TOKENS[0]}\n")
    assert clocked.after(1.0) == clocked.after(10.0) == {TOKENS[0]: "a"}


def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    clocked = Clocked(tmp_path / "tokens", f"a:{TOKENS[0]}\n")
    clocked.file.unlink()
    clocked.file.mkdir()
    assert clocked.after(1.0) == clocked.after(10.0) == {TOKENS[0]: "a"}


def test_a_key_that_came_once_is_not_remembered_for_ever() -> None:
    now = [0.0]
    limit = RateLimit(3, clock=lambda: now[0])
    for number in range(10_000):
        limit.spend(f"caller {number}")
    now[0] += 61.0
    limit.spend("a")
    assert len(limit._buckets) == 1


def test_a_key_has_its_share_of_requests_and_no_other_pays_for_it() -> None:
    now = [0.0]
    limit = RateLimit(3, clock=lambda: now[0])
    for _ in range(3):
        limit.spend("a")
    with pytest.raises(Refusal) as caught:
        limit.spend("a")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 5)
    limit.spend("b")
    now[0] += 20.0
    limit.spend("a")
    with pytest.raises(Refusal):
        limit.spend("a")


def test_a_limit_is_told_with_429_and_only_to_its_key(config: Callable[..., ServeConfig]) -> None:
    app = service(config(requests_per_minute=1), Lengths(), keys=lambda: KEYS)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            sent = [TOKENS[0], TOKENS[0], TOKENS[1]]
            headers = [{"authorization": f"Bearer {token}"} for token in sent]
            return [
                (await client.post("/get_reward", json={"query": ["a"]}, headers=one)).status_code for one in headers
            ]

    assert asyncio.run(ask()) == [200, 429, 200]
