"""Access to the service: one token or several named ones open every route; two routes, and the page itself, need none.

Invariants: a route that is not on the list of open ones is closed; tokens are compared in constant time; a token never
reaches a log; a token file that changed counts within a second, line by line; one that holds no token any more, or is gone,
closes every route once an editor would have written it again; one that cannot be read changes nothing.
"""

from __future__ import annotations

import base64
import hmac
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.config.files.tokens import Keys, parse_tokens, read_tokens
from rlhf_ray.config.sections.service import is_open_to_others
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError
from rlhf_ray.serving.refusals import Refusal, plain

OPEN_ROUTES = frozenset({"/health", "/ready"})
"""Routes that say whether the service is up, and nothing else."""
PAGE_ROUTE = "/"
"""The page of the service, which holds nothing but a field for the token (:mod:`rlhf_ray.serving.page.document`)."""
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_WITHOUT_TOKENS = 3.0
"""For so long the tokens of a file that holds none any more stay valid: some programs empty or remove a file to write it."""
KEY = "rlhf_ray.key"
"""Under this name the scope of a request holds the name of the key that opened it."""


class TokenFile:
    """The keys of a file, which is read again when it changes."""

    def __init__(self, path: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._clock = clock
        self._keys = read_tokens(path)
        self._looked, self._seen = clock(), self._state()
        self._closes_at = math.inf

    def __call__(self) -> Keys:
        """The keys that are valid now; no mapping at all but an empty one opens the service to everybody."""
        now = self._clock()
        if self._path is not None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            if (state := self._state()) != self._seen:
                self._seen = state
                self._read_again(self._path)
            if now >= self._closes_at:
                self._keys, self._closes_at = {secrets.token_hex(): "nobody"}, math.inf
                get_logger("serving").warning("token_file %s holds no token: every request is refused now", self._path)
        return self._keys

    def _read_again(self, path: Path) -> None:
        try:
            keys, problems = parse_tokens(path.read_bytes())
        except FileNotFoundError:
            keys, problems = {}, ["it is gone"]
        except OSError as error:
            get_logger("serving").warning(
                "token_file %s cannot be read (%s); the tokens read before stay valid", path, error
            )
            return
        for problem in problems:
            get_logger("serving").warning("token_file %s: %s", path, problem)
        if keys:
            self._keys, self._closes_at = keys, math.inf
            get_logger("serving").info("token_file %s changed: %d keys open now", path, len(keys))
        elif math.isinf(self._closes_at):
            self._closes_at = self._clock() + SECONDS_WITHOUT_TOKENS
            get_logger("serving").warning(
                "token_file %s holds no token: in %g s every request is refused, until it holds one",
                path,
                SECONDS_WITHOUT_TOKENS,
            )

    def _state(self) -> tuple[int, ...] | None:
        try:
            known = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return None if known is None else (known.st_mtime_ns, known.st_ctime_ns, known.st_size, known.st_ino)


def require_closed(host: str, tokens: Iterable[str]) -> None:
    """Refuse to listen for other machines without a token."""
    if is_open_to_others(host) and not tuple(tokens):
        raise RequestError(f"host {host} is reachable from other machines, but no token is set: give token_file, or host "
                           "127.0.0.1")  # fmt: skip


class TokenGate:
    """ASGI middleware that lets a request through when its token is known, or when no token is set."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Callable[[], Keys],
        on_refusal: Callable[[str, Refusal], None],
        open_routes: Collection[str] = OPEN_ROUTES,
    ) -> None:
        self.app = app
        self.keys = keys
        self.open_routes = open_routes
        self.on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = Refusal("token_required", "a token is required: send it as Authorization: Bearer TOKEN")
        self.on_refusal("token gate", refusal)
        response = JSONResponse(plain(refusal), refusal.status, {"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        keys = self.keys()
        if not keys or (
            scope["type"] == "http" and scope["path"] in self.open_routes and scope["method"] in ("GET", "HEAD")
        ):
            return True
        presented = presented_token(Headers(scope=scope).get("authorization", ""))
        # Every token is compared, so that the time does not tell which one was near.
        matches = [name for token, name in keys.items() if hmac.compare_digest(presented, token.encode())]
        if matches:
            scope[KEY] = matches[0]
        return bool(matches)


def presented_token(authorization: str) -> bytes:
    """The token of a Bearer header, or the password of HTTP Basic; empty where there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


class RateLimit:
    """A limit on the requests per minute of one key: a bucket of requests that fills evenly."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._swept = clock()

    def spend(self, key: str) -> None:
        """Count one request; raises a :class:`Refusal` where the key has none left."""
        if self._per_minute is None:
            return
        now, full = self._clock(), float(self._per_minute)
        if now - self._swept >= 60:  # a bucket is full again after a minute, and then as good as none
            self._swept = now
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if now - bucket[1] < 60}
        left, since = self._buckets.get(key, (full, now))
        left = min(full, left + (now - since) * full / 60)
        if left < 1:
            self._buckets[key] = (left, now)
            raise Refusal(
                "rate_limited", f"this key may send {self._per_minute} requests a minute: send the next one later"
            )
        self._buckets[key] = (left - 1, now)
