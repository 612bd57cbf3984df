"""Who sent a request, and whether they still wait for the answer."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from rlhf_ray.serving.auth import KEY
from rlhf_ray.serving.protocols.requests import ParsedRequest
from rlhf_ray.serving.refusals import Refusal

IDENTITY = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""What is given back as the identity of a request; anything else is replaced by one of ours."""
Value = TypeVar("Value")


def caller_of(http: Request) -> str:
    """Who takes turns with others in the queue: a key, or where there is none a machine."""
    return str(http.scope.get(KEY) or (http.client.host if http.client else ""))


def request_identity(http: Request, request: ParsedRequest) -> str:
    """The identity of a request: the caller's, where it gave a plain one."""
    identity = http.headers.get("x-request-id") or request.request_id or ""
    return identity if IDENTITY.fullmatch(identity) else uuid.uuid4().hex


def refuse_upgrade(http: Request) -> None:
    """Refuse a request that asks for another protocol on its connection: what follows its headers is not its body."""
    if any("upgrade" in value.lower() for value in http.headers.getlist("connection")):
        raise Refusal("upgrade", "the connection stays HTTP/1.1: send the request without the header Upgrade")


async def while_connected(http: Request, work: Coroutine[Any, Any, Value]) -> Value:
    """What ``work`` returns; it is cancelled, and :class:`ClientDisconnect` raised, as soon as the caller is gone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(http: Request) -> None:
    """Return when the client is gone; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
