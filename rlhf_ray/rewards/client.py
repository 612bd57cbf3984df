"""Asking a scoring backend over HTTP: :class:`RewardClient`, and :class:`AsyncRewardClient` for many calls at once.

Always true: a call ends in one result for each request, in order, or in one typed error; what may pass is tried again for
``hold_s`` seconds (no connection, overload, a restart), what may not is an error at once; connections are kept and reused;
a token in the address reaches neither a message nor a log.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import httpx

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

MAY_PASS = frozenset({429, 502, 503, 504})
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
RESULT = tuple(field.name for field in fields(ScoreResult))


class RewardClient:
    """Scores requests at ``url``; ``token`` may also be the password in it (``http://x:TOKEN@host:port``)."""

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
        """One result for each request, in order."""
        call = _Call(requests, str(self._http.base_url), self._hold_s)
        while True:
            try:
                response = self._http.post("/v1/reward", content=call.body)
            except httpx.TransportError as error:
                time.sleep(call.wait_after(repr(error)))
                continue
            if response.status_code not in MAY_PASS:
                return call.results(response)
            time.sleep(call.wait_after(_said(response), response.headers.get("retry-after")))

    def info(self) -> Mapping[str, Any]:
        """What is served: model, tokenizer fingerprint, normalisation, limits."""
        call = _Call((), str(self._http.base_url), self._hold_s)
        while True:
            try:
                response = self._http.get("/info")
            except httpx.TransportError as error:
                time.sleep(call.wait_after(repr(error)))
                continue
            if response.status_code not in MAY_PASS:
                return call.mapping(response)
            time.sleep(call.wait_after(_said(response), response.headers.get("retry-after")))

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
        """One result for each request, in order."""
        call = _Call(requests, str(self._http.base_url), self._hold_s)
        while True:
            try:
                response = await self._http.post("/v1/reward", content=call.body)
            except httpx.TransportError as error:
                await asyncio.sleep(call.wait_after(repr(error)))
                continue
            if response.status_code not in MAY_PASS:
                return call.results(response)
            await asyncio.sleep(call.wait_after(_said(response), response.headers.get("retry-after")))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Call:
    """One call and its attempts, whoever sends them."""

    def __init__(self, requests: Sequence[ScoreRequest], url: str, hold_s: float) -> None:
        self._count, self._url, self._hold_s = len(requests), url, hold_s
        self._began, self._next_wait = time.monotonic(), FIRST_WAIT_S
        self.body = json.dumps({"items": [_item(request) for request in requests]})

    def wait_after(self, failure: str, retry_after: str | None = None) -> float:
        """Seconds to wait before the next attempt; raises where the time to hold on is over."""
        left = self._began + self._hold_s - time.monotonic()
        if left <= 0:
            raise ScoringError(f"no rewards from {self._url} within {self._hold_s:g} s: {failure}")
        asked = float(retry_after) if retry_after is not None and retry_after.isdigit() else 0.0
        wait = max(asked, self._next_wait * random.uniform(0.5, 1.0))  # callers refused together come back apart
        self._next_wait = min(2 * self._next_wait, LONGEST_WAIT_S)
        return min(wait, left)

    def mapping(self, response: httpx.Response) -> Mapping[str, Any]:
        """The mapping that an answer is."""
        self._refuse(response)
        try:
            answer = response.json()
        except ValueError as error:
            raise ScoringError(f"{self._url} answers what is no scoring backend's answer ({error!r})") from error
        if not isinstance(answer, Mapping):
            raise ScoringError(f"{self._url} answers what is no scoring backend's answer")
        return answer

    def results(self, response: httpx.Response) -> list[ScoreResult]:
        """The results in an answer."""
        answers = self.mapping(response)
        try:
            results = [ScoreResult(**{name: answer[name] for name in RESULT}) for answer in answers["results"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ScoringError(f"{self._url} answers what is no scoring backend's answer ({error!r})") from error
        if len(results) != self._count:
            raise ScoringError(f"{self._url} answers {len(results)} results for {self._count} requests")
        return results

    def _refuse(self, response: httpx.Response) -> None:
        """Raise what an answer without a body of use means."""
        if response.status_code in (401, 403):
            raise RequestError(f"{self._url} refuses without a token that it knows: give token")
        if response.is_client_error:
            raise RequestError(f"{self._url} refuses the request: {_said(response)}")
        if not response.is_success:
            raise ScoringError(f"{self._url} answers {_said(response)}")


def _options(url: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    address = httpx.URL(url)
    if address.scheme not in ("http", "https") or not address.host:
        raise RequestError("a scoring backend's address is http://host:port, but this one has no scheme or no host")
    token = token or address.password or None
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
    return {"base_url": address.copy_with(userinfo=b""), "headers": headers, "timeout": timeout_s}


def _item(request: ScoreRequest) -> Mapping[str, Any]:
    values = {name: value for name, value in vars(request).items() if value is not None}
    return {**values, "messages": [dict(turn) for turn in request.messages]} if request.messages else values


def _said(response: httpx.Response) -> str:
    """The status of an answer and what it says, in short."""
    return f"{response.status_code}: {response.text[:500]}"
