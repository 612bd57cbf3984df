"""The page is the same for every service and loads nothing; what it shows is what the HTTP API answers; a text is text; the
token is in the header of requests and nowhere else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.rewards.request import PROBE, ScoreResult
from rlhf_ray.serving.server import WebServer

from ..browser import VIEWS, Watched, chromium
from .served_model import ask, backend_of
from .services import Lengths, service

pytestmark = pytest.mark.usefixtures("torch_threads")
TOKEN = "token-of-the-page-0123"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}\u202egnp.exe & \"'</textarea>"
MARKUP = "<b>no</b>"


class Inline(HTMLParser):
    """What of a document a browser would run, load or apply."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str | None]] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.texts:
            self.texts[self._inside].append(data)


def get(app: Starlette, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return ask(app, lambda client: client.get(path, headers=headers))


def test_the_page_is_the_same_for_every_service_and_tells_nothing_without_a_token(
    config: Callable[..., ServeConfig],
) -> None:
    backends = [Lengths("model-of-my-company"), Lengths("another")]
    with_token, other = (service(config(), backend, keys=lambda: {TOKEN: "me"}) for backend in backends)
    page = get(with_token, "/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == get(other, "/").text == get(with_token, "/", {"authorization": f"Bearer {TOKEN}"}).text
    assert "model-of-my-company" not in page.text and TOKEN not in page.text
    open_to_all = get(service(config(), backends[0]), "/")
    assert page.text.replace('data-asks-for-token="yes"', 'data-asks-for-token="no"') == open_to_all.text != page.text


def test_a_browser_runs_and_applies_what_is_in_the_page_and_nothing_else(config: Callable[..., ServeConfig]) -> None:
    page = get(service(config(), Lengths()), "/")
    inline = Inline(page.text)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    for kind, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = inline.texts[kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    nothing = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
    assert {policy[name] for name in nothing} == {"'none'"}
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "data:")
    names = {name for name, _ in inline.attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"style", "src", "action"}
    assert {value for name, value in inline.attributes if name == "href"} == {"data:,"}
    assert "http:" not in page.text and "https:" not in page.text
    assert page.headers["cache-control"] == "no-store" and page.headers["x-content-type-options"] == "nosniff"


def test_without_the_key_there_is_no_page(config: Callable[..., ServeConfig]) -> None:
    app = service(config(page=False), Lengths())
    assert get(app, "/").status_code == 404
    assert "/" not in get(app, "/openapi.json").json()["paths"]
    assert "/" in get(service(config(), Lengths()), "/openapi.json").json()["paths"]


@dataclass
class Served:
    """A service at an address, and what it was asked."""

    url: str
    keys: dict[str, str]

    def scores(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.post(f"{self.url}/v1/reward", json={"items": items}, headers=headers, timeout=60)
        results: list[dict[str, Any]] = answer.json()["results"]
        return results


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    servers: list[WebServer] = []

    def start(config: ServeConfig, *backends: Any) -> Served:
        keys = {TOKEN: "page"}
        servers.append(
            WebServer("0.0.0.0", 0)
        )  # as others reach it: a browser trusts addresses of its own machine more
        servers[-1].start(service(config, *backends, keys=lambda: keys))
        return Served(servers[-1].address, keys)

    yield start
    for server in servers:
        server.stop()


def open_page(watched: Watched, served: Served, token: str = TOKEN) -> Any:
    page = watched.page
    page.goto(served.url)
    page.fill("#token", token)
    page.click("#login button")
    page.wait_for_selector("#service:not([hidden])")
    return page


def fill(page: Any, prompt: str, first: str, second: str) -> None:
    page.fill("#turns textarea", prompt)
    page.fill("#text-a", first)
    page.fill("#text-b", second)


def shown(page: Any) -> list[float]:
    page.wait_for_selector("#answer-b data")
    return [float(page.get_attribute(f"#answer-{name} data", "value")) for name in "ab"]


def test_the_page_shows_the_scores_of_the_api_and_the_token_is_in_headers_alone(
    browser: Any, serve: Callable[..., Served], group: RewardGroup, model: Any, config: Callable[..., ServeConfig]
) -> None:
    settings = config(str(model))
    served = serve(settings, backend_of(group, settings))
    with Watched(browser) as watched:
        page = open_page(watched, served)
        fill(page, "why? ", HOSTILE, "because.")
        page.click("#add-turn")
        page.fill(".turn:nth-child(2) textarea", MARKUP)
        page.click("#add-turn")
        page.fill(".turn:nth-child(3) textarea", "and then?")
        page.check("#cut-b")
        page.click("#score")
        turns = [("user", "why? "), ("assistant", MARKUP), ("user", "and then?")]
        messages = [{"role": role, "content": text} for role, text in turns]
        items = [{"messages": [*messages, {"role": "assistant", "content": text}]} for text in (HOSTILE, "because.")]
        items[1]["finished"] = False
        expected = served.scores(items)
        numbers = shown(page)
        assert numbers == pytest.approx([one["raw"] for one in expected], rel=0, abs=1e-5) and numbers[0] != numbers[1]
        assert page.inner_text("#answer-a .score") == f"{numbers[0]:.4f}"
        assert f"{expected[0]['tokens']} tokens" in page.inner_text("#answer-a .details")
        better = "ab"[numbers[1] > numbers[0]]
        assert "better" in page.get_attribute(f"#answer-{better}", "class")
        assert f"by {abs(numbers[0] - numbers[1]):.4f}" in page.inner_text("#verdict")
        assert page.input_value(".turn:nth-child(2) textarea") == MARKUP
        reading = page.inner_text("#reading")
        described = backend_of(group, settings).describe()
        assert described["template"] in reading and described["reads"]["sentence"] in reading
        assert page.inner_text("#health") == "ready" and page.inner_text("#title") == str(model)
        page.locator("#state", has_text="items a second").wait_for()

        assert not watched.complaints
        assert {request.url.removeprefix(served.url) for request in watched.requests} == {
            "/", "/info", "/ready", "/metrics", "/v1/reward",
        }  # fmt: skip
        assert all(TOKEN not in request.url + str(request.post_data) for request in watched.requests)
        sent = {request.url.removeprefix(served.url): request.all_headers() for request in watched.requests}
        tokens = {path: headers.get("authorization") for path, headers in sent.items()}
        assert tokens == {path: None if path == "/" else f"Bearer {TOKEN}" for path in sent}
        assert not any({"referer", "cookie"} & headers.keys() for headers in sent.values())
        assert not watched.context.cookies() and TOKEN not in page.content() and page.input_value("#token") == ""
        assert page.evaluate("[localStorage.length, sessionStorage.length, location.href]") == [0, 0, f"{served.url}/"]


def test_what_is_wrong_is_said_and_what_was_typed_stays(
    browser: Any, serve: Callable[..., Served], config: Callable[..., ServeConfig]
) -> None:
    class Hostile(Lengths):
        """Fails with markup in its error, and is called by markup."""

        async def score(self, requests: Any) -> list[ScoreResult]:
            return [ScoreResult.of(1.0) if one == PROBE else ScoreResult.failed(HOSTILE) for one in requests]

        def describe(self) -> dict[str, Any]:
            reads = {"forms": ["text"], "sentence": HOSTILE}
            return {"model": HOSTILE, "max_tokens": 9, "reads": reads, "template": HOSTILE, "fingerprint": HOSTILE}

    served = serve(config(), Hostile())
    with Watched(browser) as watched:
        page = watched.page
        page.goto(served.url)
        page.fill("#token", "not-the-token-0123456")
        page.click("#login button")
        page.locator("#login-note", has_text="does not know").wait_for()
        assert page.is_hidden("#service")
        watched.complaints.clear()  # the browser itself notes a status of 401
        page.fill("#token", "two words")
        page.click("#login button")
        assert "no spaces" in page.inner_text("#login-note")
        page.fill("#token", TOKEN)
        page.click("#login button")
        page.wait_for_selector("#service:not([hidden])")
        assert page.is_hidden("#add-turn"), "a model of texts reads one prompt"
        fill(page, "why?", "a", "b")
        page.click("#score")
        page.wait_for_selector(".result.failed")
        assert page.inner_text("#answer-a .score").startswith("no score: <img src=x onerror=alert(1)>")
        assert page.text_content("#title") == HOSTILE and page.locator("main img, main script").count() == 0
        assert not watched.complaints
        with pytest.raises(Exception, match=r"(?i)trusted"):
            page.evaluate("document.body.innerHTML = '<b>x</b>'")
        served.keys.clear()
        served.keys["another-token-01234"] = "other"
        page.click("#score")
        page.locator("#login-note", has_text="no longer knows").wait_for()
        assert page.input_value("#text-b") == "b"


def test_latency_is_that_of_the_last_minute_as_prometheus_computes_it(
    browser: Any, serve: Callable[..., Served], config: Callable[..., ServeConfig]
) -> None:
    served = serve(config(), Lengths())
    before = 'rlhf_scoring_request_seconds_bucket{le="%s",protocol="reward"} %d\n'
    counts = [((5, 5, 5, 5), 0), ((5, 45, 95, 105), 7)]  # since then 40 requests up to 10 ms, 50 up to 100 ms, 10 more

    def exposition(bounds: tuple[int, ...], waiting: int) -> str:
        lines = "".join(before % row for row in zip(("0.005", "0.01", "0.1", "+Inf"), bounds, strict=True))
        lines += "".join(f'rlhf_scoring_replicas_down{{model="{model}"}} 1.0\n' for model in ("reward", "other"))
        return f"{lines}rlhf_scoring_waiting_items {waiting}.0\nrlhf_scoring_waiting_tokens 21.0\n"

    with Watched(browser) as watched:
        answers = iter([exposition(*counts[0]), *[exposition(*counts[1])] * 99])
        watched.page.route("**/metrics", lambda route: route.fulfill(body=next(answers), content_type="text/plain"))
        page = open_page(watched, served)
        page.locator("#state", has_text="about 21").wait_for()
        page.locator("#state-note", has_text="of the last").wait_for()
        figures = dict(re.findall(r"(waiting|latency, median|replicas down)\n+(.+)", page.inner_text("#state")))
        # the 50th of 100 lies 10 / 50 into the bucket from 10 to 100 ms; the 99th is beyond the last bound
        assert figures == {"waiting": "7", "latency, median": "28 ms", "replicas down": "2"}
        assert "99 %: 100 ms" in page.inner_text("#state")


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_fits_a_phone_and_a_desk_in_light_and_dark(
    browser: Any, serve: Callable[..., Served], config: Callable[..., ServeConfig], width: int, scheme: str
) -> None:
    served = serve(config(), Lengths("a-model-with-a-long-name-" * 8), Lengths("other"))
    with Watched(browser, width=width, scheme=scheme) as watched:
        page = open_page(watched, served)
        fill(page, "why?", "x" * 90, HOSTILE * 30)
        page.click("#score")
        page.wait_for_selector(".result .score:not(:empty)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
        assert (brightness > 127) is (scheme == "light")
        boxes = [page.locator(f"#answer-{name}").bounding_box() for name in "ab"]
        assert (boxes[0]["y"] == boxes[1]["y"]) is (width > 1000), "side by side where there is room"
        assert not watched.complaints
