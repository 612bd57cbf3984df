"""Hostile requests against the whole app over a real reward model, in this process, and over HTTP from Schemathesis.

    python -m tests.serving.fuzz [--requests 20000] [--examples 100] [--seed 0]

Always true, whatever is sent: the answer is a score or a documented refusal with a kind and a sentence; it is JSON without
NaN; no unexpected 5xx; nothing that was sent is in the log; no connection is opened; a good request afterwards is scored as
before; memory stays where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
from starlette.applications import Starlette

from rlhf_ray import environment
from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.console import get_logger
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.protocols.registry import PROTOCOLS
from rlhf_ray.serving.refusals import KINDS

from . import openapi_requests
from .reward_models import BOS, EOS, PAD, save_reward_model
from .services import service

MARK, TOKEN = "fuzzed-secret", "a-token-of-the-fuzzing"
LIMIT, MAX_ITEMS, MAX_BODY = 64, 16, 100_000
STATUSES = {200, *(status for status, _ in KINDS.values())} - {500}
GOOD = {"query": [f"{BOS}good{EOS}"]}
GROWTH = 1.05
TEXTS = (
    MARK, "", " ", "\0", f"{MARK}\ud800", "\udfff", f"{BOS}{BOS}{EOS}{PAD}", "[user]", "<|im_start|>system", "{{ 7 * 7 }}",
    "{% for x in y %}", "ünï\u202e\ufeff", "é" * 40, "x" * 1000, "http://192.0.2.1/", "../../etc/passwd", "\r\nX: y",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2**31, -(2**63), 10**30, 1.5, 1e308, True, False, None, 258, 259, 260)


def corpus() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Requests by hand: what people who mean harm, or their libraries, are known to send."""
    path = "/v1/reward"
    for literal in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b'"\\ud800"', b'"\\u0000"'):
        yield path, b'{"items": [{"token_ids": [' + literal + b"]}]}", {}
        yield path, b'{"items": [{"text": ' + literal + b"}]}", {}
        yield "/classify", b'{"input": ' + literal + b"}", {}
    for depth in (10, 500, 1000, 40_000):
        yield path, b"[" * depth, {}
        yield path, b'{"items": ' + b"[" * depth + b"]" * depth + b"}", {}
        yield path, b'{"a":' * depth + b"1" + b"}" * depth, {}
    yield path, b'{"items": [' + b",".join([b"{}"] * 10_000) + b"]}", {}
    yield path, b'{"items": [{"token_ids": [' + b"5," * 40_000 + b"5]}]}", {}
    yield path, b'{"items": [{"text": "' + b"x" * (2 * MAX_BODY) + b'"}]}', {}
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "x" * 1000):
        yield path, b"\x1f\x8b\x08" + b"\0" * 100, {"content-encoding": encoding}
    for content in (
        b"",
        b"\xff\xfe\0",
        b"null",
        b"[]",
        b'"a"',
        b'{"items": [}',
        b'{"items": []} {"items": []}',
        b"\xef\xbb\xbf{}",
    ):
        yield path, content, {}
    for header in ("x-request-id", "authorization", "content-type", "accept", "cookie", "x-forwarded-for"):
        yield path, b'{"items": []}', {header: f"{MARK} <script> {'y' * 500}"}
    yield path, b'{"items": [], "items": [{"text": "a"}]}', {}


class Sender:
    """Makes bodies that resemble real ones, and spoils them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.examples = [(path, one.bodies[0].example) for one in PROTOCOLS for path in one.paths]
        self.keys = sorted(
            {key for one in PROTOCOLS for form in one.bodies for key in form.model_fields}
            | {"truncate", "text", "role"}
        )

    def request(self) -> tuple[str, bytes, dict[str, str]]:
        """One request."""
        path, example = self.draw.choice(self.examples)
        body = json.loads(json.dumps(example))
        for _ in range(self.draw.randrange(1, 4)):
            body = self.spoil(body)
        content = json.dumps(body).encode()
        if self.draw.random() < 0.05:
            content = self._torn(content)
        return path, content, {}

    def spoil(self, value: Any, depth: int = 0) -> Any:
        if self.draw.random() < 0.25 or depth > 4 or not isinstance(value, dict | list) or not value:
            return self._any(2)
        if isinstance(value, dict):
            key = self.draw.choice(self.keys) if self.draw.random() < 0.3 else self.draw.choice(list(value))
            if self.draw.random() < 0.15:
                return {name: one for name, one in value.items() if name != key}
            return {**value, key: self.spoil(value.get(key), depth + 1)}
        at = self.draw.randrange(len(value))
        if self.draw.random() < 0.3:
            return value * self.draw.choice((0, 2, 20))
        return [*value[:at], self.spoil(value[at], depth + 1), *value[at + 1 :]]

    def _any(self, depth: int) -> Any:
        kind = self.draw.randrange(6 if depth else 4)
        if kind < 2:
            return self.draw.choice(TEXTS)
        if kind < 4:
            return self.draw.choice(NUMBERS)
        if kind == 4:
            return [self._any(depth - 1) for _ in range(self.draw.randrange(4))]
        return {self.draw.choice((*self.keys, MARK)): self._any(depth - 1) for _ in range(self.draw.randrange(3))}

    def _torn(self, content: bytes) -> bytes:
        at = self.draw.randrange(len(content) + 1)
        return content[:at] + bytes(self.draw.randrange(256) for _ in range(self.draw.randrange(4))) + content[at + 1 :]


@dataclass
class Finding:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def look(self, path: str, content: bytes, response: httpx.Response) -> None:
        """Judge one answer."""
        self.statuses[response.status_code] += 1
        if response.status_code not in STATUSES:
            self.problems.append(f"{response.status_code} from {path} for {content[:200]!r}")
        try:
            answer = json.loads(response.content, parse_constant=_no_number)
        except ValueError:
            self.problems.append(f"{path} answers what is no JSON for {content[:200]!r}")
            return
        if response.status_code != 200:
            error = answer.get("error")
            kind = error.get("type") if isinstance(error, dict) else answer.get("kind")
            self.kinds[str(kind)] += 1
            if kind not in KINDS or KINDS[kind][0] != response.status_code:
                self.problems.append(f"{path} refuses without a kind of its status for {content[:200]!r}")
            if MARK in response.text:
                self.problems.append(f"{path} gives a text back in a refusal for {content[:200]!r}")


def _no_number(name: str) -> Any:
    raise ValueError(name)


@contextmanager
def listening_to_log() -> Iterator[io.StringIO]:
    """What the project's logger says."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    get_logger().addHandler(handler)
    try:
        yield log
    finally:
        get_logger().removeHandler(handler)


_connections: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _connections is not None and event in ("socket.connect", "socket.getaddrinfo"):
        _connections.append(f"{event} {arguments[1:]}")


sys.addaudithook(_audit)


@contextmanager
def watching_connections() -> Iterator[list[str]]:
    """Connections that this process opens meanwhile, and names that it looks up."""
    global _connections
    _connections = opened = []
    try:
        yield opened
    finally:
        _connections = None


def asking(app: Starlette) -> httpx.AsyncClient:
    """A client in this process, with the token."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)


async def send(app: Starlette, requests: Sequence[tuple[str, bytes, dict[str, str]]], finding: Finding) -> None:
    """All requests, a few at a time."""
    async with asking(app) as client:

        async def one(path: str, content: bytes, headers: dict[str, str]) -> None:
            finding.look(path, content, await client.post(path, content=content, headers=headers))

        for start in range(0, len(requests), 8):
            await asyncio.gather(*(one(*request) for request in requests[start : start + 8]))


async def good_score(app: Starlette) -> float:
    """The score of the good request."""
    async with asking(app) as client:
        return float((await client.post("/get_reward", json=GOOD)).json()["rewards"][0])


def fuzz(app: Starlette, count: int, seed: int = 0, report: Callable[[str], None] = lambda _: None) -> Finding:
    """The corpus and ``count`` made requests."""
    finding, sender, process = Finding(), Sender(seed), psutil.Process()
    with listening_to_log() as log, watching_connections() as opened:
        expected = asyncio.run(good_score(app))
        asyncio.run(send(app, list(corpus()), finding))
        before = 0
        for start in range(0, count, 1000):
            asyncio.run(send(app, [sender.request() for _ in range(min(1000, count - start))], finding))
            before = before or process.memory_full_info().pss
            report(f"{min(start + 1000, count)} of {count}: {dict(finding.statuses)}")
        grown = process.memory_full_info().pss / before
        if asyncio.run(good_score(app)) != expected:
            finding.problems.append("a good request is scored otherwise than before")
    if count > 5000 and grown > GROWTH:
        finding.problems.append(f"memory grew by {grown - 1:.1%}")
    if MARK in log.getvalue():
        finding.problems.append("a text is in the log")
    finding.problems += [f"a connection was opened: {one}" for one in opened]
    return finding


def fuzzed_app(directory: Path) -> Starlette:
    """The app over a tiny reward model, with its token on."""
    path = save_reward_model(directory)
    role = ScoringRole(model=ModelConfig(path=str(path), dtype="fp32"))
    config = ServeConfig(
        kind="serve", run=RunConfig(name="fuzz"), reward=role, max_items=MAX_ITEMS, max_body_bytes=MAX_BODY, max_tokens=LIMIT
    )  # fmt: skip
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    group.setup(RewardSetup(role, seed=0, max_tokens=256, max_item_tokens=LIMIT), timeout_s=60.0).result()
    return service(config, GroupBackend(group, role.model, normalize=False), keys=lambda: {TOKEN: "fuzz"})


def over_http(app: Starlette, examples: int, seed: int) -> openapi_requests.SchemathesisRun:
    """Schemathesis's requests to an app that has answered many, under what always holds."""
    process = psutil.Process()
    with watching_connections() as opened:
        before = process.memory_full_info().pss
        run = openapi_requests.send(app, TOKEN, examples, seed)
        grown = process.memory_full_info().pss / before
    problems = [*run.problems, *(f"a connection was opened: {one}" for one in opened)]
    if grown > GROWTH:
        problems.append(f"memory grew by {grown - 1:.1%} under Schemathesis")
    return replace(run, problems=problems)


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(prog="tests.serving.fuzz", description="hostile requests against the scoring app")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=100, help="of Schemathesis, an operation")
    arguments = parser.parse_args()
    environment.prepare()
    openapi_requests.command()
    with TemporaryDirectory() as name:
        app = fuzzed_app(Path(name))
        finding = fuzz(app, arguments.requests, arguments.seed, print)
        print(f"statuses {dict(finding.statuses)}; kinds {dict(finding.kinds)}", flush=True)
        run = over_http(app, arguments.examples, arguments.seed)
    problems = finding.problems + run.problems
    print(
        f"{finding.statuses.total()} requests in this process, {run.requests} of Schemathesis: {len(problems)} problems"
    )
    for problem in problems[:50]:
        print(f"PROBLEM: {problem}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
