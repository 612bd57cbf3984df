"""Ask an endpoint that speaks OpenAI's chat completions many questions at once, within limits of time, tries and budget.

Invariants: every question ends in a reply or in one :class:`NoReply`, and nothing waits longer than its tries allow. No request
is sent that the budget may not hold. An endpoint that has stopped to answer, or that refuses every question, is asked no
further in this call. The key reaches neither a message nor a log.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import httpx

from rlhf_ray.console import get_logger
from rlhf_ray.processes import progress
from rlhf_ray.rewards.judge.budget import Amount, Budget, Prices
from rlhf_ray.rewards.judge.questions import Messages
from rlhf_ray.rewards.request import Fault
from rlhf_ray.transient import status_may_pass

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
LARGEST_REPLY = 1 << 20
"""Bytes of the body of a reply that are read at most."""
HOPELESS = {401: "refuses the key", 402: "wants to be paid", 403: "refuses the key", 404: "knows no such model or path"}
"""Statuses that every other question would get too."""
SILENT_IN_A_ROW = 4
"""After so many questions one after the other, and at least one for each place, the rest is not asked."""


@dataclass(frozen=True)
class NoReply:
    """Why a question has no reply, whose fault it is, and whether every other question would end the same."""

    reason: str
    fault: Fault
    hopeless: bool = False


@dataclass(frozen=True)
class EndpointSettings:
    """Where a judge is, and how it is asked."""

    url: str
    """The address that ``/chat/completions`` is added to."""
    model: str
    key: str | None
    longest_reply: int
    limit_field: Literal["max_tokens", "max_completion_tokens"]
    temperature: float | None
    parameters: Mapping[str, Any]
    """Further fields of every request."""
    concurrency: int
    tries: int
    timeout_s: float
    """Seconds of one try."""
    prices: Prices


@dataclass
class Call:
    """What the questions of one call share."""

    client: httpx.AsyncClient
    places: asyncio.Semaphore
    freed: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Notified when a question under way has ended, so that its part of the budget is free."""
    silent: int = 0
    """Questions that ended without an answer of the endpoint since the last that had one."""
    given_up: NoReply | None = None


class Endpoint:
    """A judge's endpoint and its budget."""

    def __init__(self, settings: EndpointSettings, budget: Budget, *, name: str = "the judge") -> None:
        """``name`` is the key of its section, for messages."""
        self.settings, self.budget, self.name = settings, budget, name

    def ask(self, questions: Sequence[Messages]) -> list[str | NoReply]:
        """One reply a question, in order, or why there is none. Not to be called from an event loop."""
        if not questions:
            return []
        try:
            return asyncio.run(self._ask(questions))
        finally:
            self.budget.keep()

    async def _ask(self, questions: Sequence[Messages]) -> list[str | NoReply]:
        settings = self.settings
        headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
        limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        async with httpx.AsyncClient(
            headers=headers, timeout=settings.timeout_s, limits=limits, verify=_trusted()
        ) as client:
            call = Call(client, asyncio.Semaphore(settings.concurrency))
            return await asyncio.gather(*(self._one(call, question) for question in questions))

    async def _one(self, call: Call, question: Messages) -> str | NoReply:
        async with call.places:
            if call.given_up is not None:
                return call.given_up
            with progress.waiting(self.settings.tries * (self.settings.timeout_s + 2 * LONGEST_WAIT_S)):
                reply = await self._tries(call, question)
        self._watch(call, reply)
        return reply

    def _watch(self, call: Call, reply: str | NoReply) -> None:
        """Give up on the rest where an endpoint is silent, or refuses everything."""
        is_silent = isinstance(reply, NoReply) and reply.fault == "source"
        call.silent = call.silent + 1 if is_silent else 0
        if not isinstance(reply, NoReply) or call.given_up is not None:
            return
        if reply.hopeless or call.silent >= max(SILENT_IN_A_ROW, self.settings.concurrency):
            call.given_up = reply
            get_logger("rewards").warning("%s: %s; the rest of the call is not asked", self.name, reply.reason)

    async def _tries(self, call: Call, question: Messages) -> str | NoReply:
        settings, wait_s = self.settings, FIRST_WAIT_S
        body = json.dumps(self._body(question), ensure_ascii=False)
        most = settings.prices.most(body, settings.longest_reply)
        for number in range(settings.tries):
            passed = await self._reserved(call, most)
            if passed is not None:
                return NoReply(
                    f"the budget is spent ({passed}): raise it, or go on without this judge", "model", hopeless=True
                )
            reply, asked_s = await self._try(call, body, most)
            if isinstance(reply, str) or reply.fault != "source" or number == settings.tries - 1:
                return reply
            await asyncio.sleep(min(max(asked_s, wait_s * random.uniform(0.5, 1.0)), LONGEST_WAIT_S))
            wait_s = 2 * wait_s
        raise AssertionError("there is at least one try")

    async def _reserved(self, call: Call, most: Amount) -> str | None:
        """Set the cost of one question aside; where only questions under way stand against it, once they have ended."""
        async with call.freed:
            while True:
                passed = self.budget.reserve(most)
                if passed is None or self.budget.under_way.requests == 0:
                    return passed
                await call.freed.wait()  # each question under way has a limit of time

    async def _try(self, call: Call, body: str, most: Amount) -> tuple[str | NoReply, float]:
        """One request: its reply, and for how many seconds the endpoint wants to be left alone."""
        spent = most  # until it is known that it was less: a request that was lost may have been counted
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                status, text, headers = await self._send(call.client, body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            spent = Amount()
            return NoReply(f"{self.settings.url} cannot be reached ({self._hide(repr(error))})", "source"), 0.0
        except (TimeoutError, httpx.TimeoutException):
            return NoReply(f"no reply within {self.settings.timeout_s:g} s (timeout_s)", "source"), 0.0
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = f"the connection to {self.settings.url} failed ({self._hide(repr(error))})"
            return NoReply(why, "source"), 0.0
        else:
            if 200 <= status < 300:
                reply, spent = self._read(text, most)
                return reply, 0.0
            if status < 500 and status != 408:  # what a gateway answers for a model may come after the model has worked
                spent = Amount(requests=1)
            return self._refused(status, text), _seconds(headers.get("retry-after"))
        finally:
            self.budget.settle(most, spent)
            async with call.freed:
                call.freed.notify_all()

    async def _send(self, client: httpx.AsyncClient, body: str) -> tuple[int, str, httpx.Headers]:
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        headers = {"content-type": "application/json"}
        async with client.stream("POST", url, content=body.encode(), headers=headers) as response:
            content = b""
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > LARGEST_REPLY:
                    break
            return response.status_code, content.decode(errors="replace"), response.headers

    def _body(self, question: Messages) -> dict[str, Any]:
        settings = self.settings
        temperature = {} if settings.temperature is None else {"temperature": settings.temperature}
        return {
            **settings.parameters, "model": settings.model, "messages": question,
            settings.limit_field: settings.longest_reply, **temperature,
        }  # fmt: skip

    def _refused(self, status: int, text: str) -> NoReply:
        shown = f"{self.settings.url} answers {status}: {self._without_key(text)}"
        if status in HOPELESS:
            return NoReply(f"the endpoint {HOPELESS[status]}: {shown}", "model", hopeless=True)
        return NoReply(shown, "source" if status_may_pass(status) else "item")

    def _read(self, text: str, most: Amount) -> tuple[str | NoReply, Amount]:
        """The text of a reply, and what it has cost: what its ``usage`` says, or else the most that it can have cost."""
        try:
            answer = json.loads(text)
            choice = answer["choices"][0]
            content, reason = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return NoReply(f"{self.settings.url} answers no chat completion: {self._without_key(text)}", "item"), most
        spent = _usage(answer.get("usage"), self.settings.prices) or most
        if reason in ("length", "content_filter"):
            why = "was cut at max_answer_tokens" if reason == "length" else "was filtered by the endpoint"
            return NoReply(f"the reply {why}", "item"), spent
        if not isinstance(content, str) or not content.strip():
            return NoReply(f"the endpoint declined to reply: {self._without_key(text)}", "item"), spent
        return self._hide(content), spent

    def _without_key(self, text: str) -> str:
        shown = self._hide(text).strip()
        return shown if len(shown) <= 300 else f"{shown[:300]}..."

    def _hide(self, text: str) -> str:
        return text.replace(self.settings.key, "(the key)") if self.settings.key else text


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that are trusted; reading them takes longer than many a call."""
    return httpx.create_ssl_context()


def _usage(usage: Any, prices: Prices) -> Amount | None:
    """What the endpoint counted; None where it does not say so in numbers."""
    if not isinstance(usage, Mapping):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        return None
    prompt, reply = counts
    assert prompt is not None and reply is not None
    return prices.amount(prompt, reply)


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdecimal() else 0.0
