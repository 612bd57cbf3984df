"""Reading the JSON object in a request's body.

Invariants: a body is counted while it arrives, and read only up to its limits, so that nothing is built of one that has too
much of anything; the memory of all bodies together is bounded, and no caller takes all of it; a large body is read in a thread
beside the event loop, one of a caller at a time; NaN, Infinity and compressed bodies are refused; a refusal never holds a part
of the body.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar
from weakref import WeakValueDictionary

from starlette.requests import Request

from rlhf_ray.serving.protocols.fields import type_name
from rlhf_ray.serving.refusals import Refusal
from rlhf_ray.serving.transport.json_size import JsonSize
from rlhf_ray.serving.transport.shares import SharedLimit

PARTS_PER_ITEM = 400
"""Texts, lists and objects of a body, for each item that it may have: long conversations with tools have about a hundred."""
FEWEST_PARTS = 100_000
LARGE_BODY = 65_536
"""Bytes in memory from which on a body is read in a thread: a thousand short items take longer to read than one long text."""
READERS = 2
Read = TypeVar("Read")


class BodyReader:
    """Reads bodies, of ``max_bytes`` each and about ``max_bytes_together`` in memory."""

    def __init__(self, *, max_bytes: int, max_bytes_together: int, timeout_s: float, max_items: int = 1024) -> None:
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.max_parts = max(PARTS_PER_ITEM * max_items, FEWEST_PARTS)
        self._memory = SharedLimit(max(max_bytes_together, 2 * max_bytes))
        self._readers = ThreadPoolExecutor(READERS, "body reader")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def held(self) -> int:
        """About how many bytes the bodies take that are being read or answered."""
        return self._memory.held

    @contextmanager
    def reserving(self, request: Request, caller: str) -> Iterator[Body]:
        """A body that is held until the block ends; it takes of the caller's share as it arrives."""
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            self._too_large()
        body = Body(self, request, caller)
        try:
            yield body
        finally:
            self._memory.give_back(caller, body.held)

    def take(self, caller: str, units: int) -> None:
        """Take memory for a caller; raises a :class:`Refusal` where it has its share."""
        if not self._memory.take(caller, units):
            raise Refusal("overloaded", f"bodies of about {self.held} bytes are being read or answered: try again")

    async def beside(self, caller: str, read: Callable[[], Read]) -> Read:
        """What ``read`` returns, in a thread; a caller with many large bodies waits for itself alone."""
        turn = self._turns.get(caller) or asyncio.Lock()
        self._turns[caller] = turn
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    def _too_large(self) -> NoReturn:
        raise Refusal("body_too_large", f"the body is larger than {self.max_bytes} bytes: send fewer items")

    def check(self, size: JsonSize) -> None:
        """Refuse a body that has more of anything than is read."""
        if size.bytes > self.max_bytes:
            self._too_large()
        if size.memory > self._memory.limit // 2:
            raise Refusal("body_too_large", "the body takes more than half of max_bodies_bytes: send fewer items")
        if size.containers + size.texts > self.max_parts:
            raise Refusal(
                "body_too_large",
                f"the body holds more than {self.max_parts} texts, lists and objects: send fewer items",
            )


class Body:
    """The body of one request."""

    def __init__(self, reader: BodyReader, request: Request, caller: str) -> None:
        self._reader, self._request, self._caller = reader, request, caller
        self.held = 0
        """About how many bytes it takes."""

    async def read(self, read: Callable[[Mapping[str, Any]], Read]) -> Read:
        """What ``read`` makes of the JSON object that the body is."""
        encoding = self._request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise Refusal("compressed", "the body is compressed: send it as it is")
        try:
            async with asyncio.timeout(self._reader.timeout_s):
                content = await self._content()
        except TimeoutError:
            raise Refusal("slow_body", f"the body did not arrive within {self._reader.timeout_s:g} s") from None
        if self.held < LARGE_BODY:
            return read(parse_object(content))
        return await self._reader.beside(self._caller, lambda: read(parse_object(content)))

    async def _content(self) -> bytes:
        content, size = bytearray(), JsonSize()
        async for chunk in self._request.stream():
            size.feed(chunk)
            self._reader.check(size)
            self._reader.take(self._caller, size.memory - self.held)
            self.held = size.memory
            content += chunk
        return bytes(content)


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
