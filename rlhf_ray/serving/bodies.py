"""Request bodies as JSON, and what is wrong with their values.

Always true: a body is read only up to the limits of size and time; NaN, Infinity and compressed bodies are refused; what
is refused is said with the key and the value's type, never with its text, which stays out of answers and logs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.serving.refusals import Refusal

Kind = TypeVar("Kind")
NAMES: Mapping[type, str] = {
    bool: "true or false",
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "an object",
}


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
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told) > self.max_bytes:
            self._too_large()
        size = int(told) if told.isdigit() else self.max_bytes
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
        raise Refusal("wrong_body", f"the body must be a JSON object, not {kind(body)}")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def kind(value: Any) -> str:
    """What a value is, without telling it."""
    return "nothing" if value is None else type(value).__name__


def field(body: Mapping[str, Any], name: str, form: type[Kind], default: Kind) -> Kind:
    """``body[name]``, which must be of the form; ``default`` where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
        raise Refusal("wrong_body", f"{name} must be {NAMES[form]}, not {kind(value)}")
    return value


def text_of(value: Any, name: str) -> str:
    """A text; ``name`` says where it stands."""
    if not isinstance(value, str):
        raise Refusal("wrong_body", f"{name} must be a text, not {kind(value)}")
    return value


def is_ids(value: Any) -> bool:
    """A list of whole numbers."""
    return isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def is_messages(value: Any) -> bool:
    """A conversation."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


def messages_of(value: Any, name: str = "messages") -> tuple[Mapping[str, str], ...]:
    """A conversation."""
    if not is_messages(value):
        raise Refusal("wrong_body", f"{name} must be a list of objects with the texts role and content")
    return tuple(value)


def item(name: str, **values: Any) -> ScoreRequest:
    """A request of ``values``; ``name`` says where they stand."""
    try:
        return ScoreRequest(**values)
    except RequestError as error:
        raise Refusal("item", f"{name}: {error}") from error


def refuse_unserved(body: Mapping[str, Any], unserved: Mapping[str, str]) -> None:
    """Refuse keys that would change a score and are not served; ``unserved`` tells why, or what to do instead."""
    for name, why in unserved.items():
        if body.get(name) not in (None, False, 0, {}, []):
            raise Refusal("unsupported", f"{name} is not served: {why}")
