"""HTTP clients of a scoring backend: :class:`RewardClient`, and :class:`AsyncRewardClient` for code in an event loop.

Invariants: a call ends in one result per request, in order, or in one typed error. A failure that may pass (no
connection, overload, a restart) is tried again for ``hold_s`` seconds; anything else is an error at once. Connections
are kept and reused. A token in the address reaches neither a message nor a log.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from types import TracebackType
from typing import Any

import httpx

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.processes import progress
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.transient import PASSING_STATUSES, status_may_pass

MAY_PASS = PASSING_STATUSES | {502, 503, 504}
"""Statuses that another attempt may not get, for which no model was at fault."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
RESULT_FIELDS = tuple(field.name for field in fields(ScoreResult))
NO_ANSWER = "answers, but not as a scoring backend does"


class RewardClient:
    """Scores requests at ``url``; ``token`` may also be the password in it (``http://x:TOKEN@host:port``).

    ``timeout_s`` is the limit of one attempt, ``hold_s`` for how long failed attempts are followed by others.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        hold_s: float = 100.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._hold_s = hold_s
        self._http = httpx.Client(**_options(url, token, timeout_s), transport=transport)

    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """One result per request, in order."""
        return _results(self._send("POST", "/v1/reward", _body(requests)), len(requests), self._url)

    def info(self) -> Mapping[str, Any]:
        """What is served: model, tokenizer fingerprint, normalisation, limits."""
        return _mapping(self._send("GET", "/info"), self._url)

    def _send(self, method: str, path: str, content: str | None = None) -> httpx.Response:
        """The first response that another attempt would not change."""
        with _wait(self._http, self._hold_s):
            return self._try(method, path, content)

    def _try(self, method: str, path: str, content: str | None) -> httpx.Response:
        attempts = _Attempts(self._url, self._hold_s)
        while True:
            try:
                response = self._http.request(method, path, content=content)
            except httpx.TransportError as error:
                wait_s = attempts.wait_after(_why(error, self._http))
            else:
                if response.status_code not in MAY_PASS:
                    return response
                wait_s = attempts.wait_after(_summary(response), response.headers.get("retry-after"))
            time.sleep(wait_s)

    @property
    def _url(self) -> str:
        return str(self._http.base_url)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncRewardClient:
    """The same for code that runs in an event loop."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        hold_s: float = 100.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hold_s = hold_s
        self._http = httpx.AsyncClient(**_options(url, token, timeout_s), transport=transport)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """One result per request, in order."""
        return _results(await self._send("POST", "/v1/reward", _body(requests)), len(requests), self._url)

    async def info(self) -> Mapping[str, Any]:
        """What is served: model, tokenizer fingerprint, normalisation, limits."""
        return _mapping(await self._send("GET", "/info"), self._url)

    async def _send(self, method: str, path: str, content: str | None = None) -> httpx.Response:
        """The first response that another attempt would not change."""
        with _wait(self._http, self._hold_s):
            return await self._try(method, path, content)

    async def _try(self, method: str, path: str, content: str | None) -> httpx.Response:
        attempts = _Attempts(self._url, self._hold_s)
        while True:
            try:
                response = await self._http.request(method, path, content=content)
            except httpx.TransportError as error:
                wait_s = attempts.wait_after(_why(error, self._http))
            else:
                if response.status_code not in MAY_PASS:
                    return response
                wait_s = attempts.wait_after(_summary(response), response.headers.get("retry-after"))
            await asyncio.sleep(wait_s)

    @property
    def _url(self) -> str:
        return str(self._http.base_url)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Attempts:
    """How long one call waits between its attempts, and when it gives up: the policy of both clients."""

    def __init__(self, url: str, hold_s: float) -> None:
        self._url, self._hold_s = url, hold_s
        self._deadline, self._next_wait = time.monotonic() + hold_s, FIRST_WAIT_S

    def wait_after(self, failure: str, retry_after: str | None = None) -> float:
        """Seconds to wait before the next attempt; raises ``failure`` where the time to hold on is over.

        Waits double up to a limit and are drawn at random below it, so that callers that were refused together come back
        apart; if the server says when to come back, they wait that long.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise ScoringError(f"no rewards from {self._url} within {self._hold_s:g} s: {failure}")
        asked_s = float(retry_after) if retry_after is not None and retry_after.isdigit() else 0.0
        wait = max(asked_s, self._next_wait * random.uniform(0.5, 1.0))
        self._next_wait = min(2 * self._next_wait, LONGEST_WAIT_S)
        return min(wait, left)


def _wait(client: httpx.Client | httpx.AsyncClient, hold_s: float) -> AbstractContextManager[None]:
    """A wait for as long as all attempts of a call may take, the last of which may begin when the time to hold on is over."""
    return progress.waiting(hold_s + (client.timeout.read or 0.0))


def _why(error: httpx.TransportError, client: httpx.Client | httpx.AsyncClient) -> str:
    """What is said of an attempt without an answer; one that took too long names its limit."""
    if isinstance(error, httpx.TimeoutException):
        limit = f"{client.timeout.read:g} s (timeout_s, of a run's source reward.timeout_s)"
        return f"{type(error).__name__}: no answer within {limit}"
    return repr(error)


def _results(response: httpx.Response, count: int, url: str) -> list[ScoreResult]:
    """The results in an answer to ``count`` requests."""
    answer = _mapping(response, url)
    try:
        results = [ScoreResult(**{name: result[name] for name in RESULT_FIELDS}) for result in answer["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ScoringError(f"{url} {NO_ANSWER} ({error!r})") from error
    if len(results) != count:
        raise ScoringError(f"{url} answers {len(results)} results for {count} requests")
    return results


def _mapping(response: httpx.Response, url: str) -> Mapping[str, Any]:
    """The JSON object in an answer; raises what an answer without one means."""
    if response.status_code in (401, 403):
        raise RequestError(f"{url} refuses without a token that it knows: give token")
    if response.is_client_error:
        raise RequestError(f"{url} refuses the request: {_summary(response)}")
    if not response.is_success:
        raise ScoringError(f"{url} answers {_summary(response)}", may_pass=status_may_pass(response.status_code))
    try:
        answer = response.json()
    except ValueError as error:
        raise ScoringError(f"{url} {NO_ANSWER} ({error!r})") from error
    if not isinstance(answer, Mapping):
        raise ScoringError(f"{url} {NO_ANSWER}")
    return answer


def _options(url: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    address = httpx.URL(url)
    if address.scheme not in ("http", "https") or not address.host:
        raise RequestError("a scoring backend's address is http://host:port, but this one has no scheme or no host")
    token = token or address.password or None
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
    return {"base_url": address.copy_with(userinfo=b""), "headers": headers, "timeout": timeout_s}


def _body(requests: Sequence[ScoreRequest]) -> str:
    return json.dumps({"items": [_item(request) for request in requests]})


def _item(request: ScoreRequest) -> Mapping[str, Any]:
    """The fields that say anything: the others are left to the service."""
    of_request = {field.name: (getattr(request, field.name), field.default) for field in fields(request)}
    values = {name: value for name, (value, default) in of_request.items() if value != default}
    values |= {name: [dict(one) for one in values[name]] for name in ("messages", "tools") if name in values}
    return values


def _summary(response: httpx.Response) -> str:
    """The status of an answer and the beginning of its text."""
    return f"{response.status_code}: {response.text[:500]}"
