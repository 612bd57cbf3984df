"""Reads the body of a request as a JSON object, within limits of size and time.

Invariants: a body is read only up to its limits; the bytes that are held for all requests together are bounded; NaN,
Infinity and compressed bodies are refused; a refusal never holds a part of the body.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from starlette.requests import Request

from rlhf_ray.serving.protocols.fields import type_name
from rlhf_ray.serving.refusals import Refusal


class BodyReader:
    """Reads bodies, a bounded number of bytes of all of them together."""

    def __init__(self, *, max_bytes: int, max_bytes_together: int, timeout_s: float) -> None:
        self.max_bytes = max_bytes
        self.max_bytes_together = max(max_bytes, max_bytes_together)
        self.timeout_s = timeout_s
        self.held = 0

    @contextmanager
    def reserving(self, request: Request) -> Iterator[None]:
        """Hold as many bytes as the request says it sends, or may send, until it is answered."""
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            self._too_large()
        size = int(length) if length.isdigit() else self.max_bytes
        if self.held + size > self.max_bytes_together:
            raise Refusal("overloaded", f"{self.held} bytes of other requests are held: try again")
        self.held += size
        try:
            yield
        finally:
            self.held -= size

    async def json(self, request: Request) -> Mapping[str, Any]:
        """The JSON object of a request's body."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise Refusal("compressed", "the body is compressed: send it as it is")
        try:
            async with asyncio.timeout(self.timeout_s):
                content = await self._content(request)
        except TimeoutError:
            raise Refusal("slow_body", f"the body did not arrive within {self.timeout_s:g} s") from None
        return parse_object(content)

    async def _content(self, request: Request) -> bytes:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > self.max_bytes:
                self._too_large()
        return bytes(content)

    def _too_large(self) -> NoReturn:
        raise Refusal("body_too_large", f"the body is larger than {self.max_bytes} bytes: send fewer items")


def parse_object(content: bytes) -> Mapping[str, Any]:
    """The JSON object that ``content`` is."""
    try:
        body = json.loads(content, parse_constant=_no_number)
    except RecursionError as error:
        raise Refusal("too_deep", "the body is nested too deeply") from error
    except ValueError as error:
        raise Refusal("not_json", "the body is not JSON (NaN and Infinity are not, either)") from error
    if not isinstance(body, dict):
        raise Refusal("wrong_body", f"the body must be a JSON object, not {type_name(body)}")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
