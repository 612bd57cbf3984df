"""Who may ask: one token, or several named ones, for every route but the two that say whether the service is up.

Always true: a route that nobody thought of is closed; tokens are compared in constant time; a token never reaches a log.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.errors import RequestError

OPEN_ROUTES = frozenset({"/health", "/ready"})
SHORTEST_TOKEN = 16


def read_tokens(path: str | None) -> tuple[str, ...]:
    """Tokens of a file: one a line, ``name:token`` or bare; ``#`` begins a comment. No path means no token."""
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"token_file {path} cannot be read ({error}): write one token a line into it") from error
    tokens = tuple(line.rpartition(":")[2] for line in lines if line and not line.startswith("#"))
    short = [number for number, token in enumerate(tokens, 1) if len(token) < SHORTEST_TOKEN]
    if short or not tokens:
        what = f"token {short[0]} is shorter than {SHORTEST_TOKEN} characters" if short else "there is no token in it"
        raise RequestError(
            f"token_file {path}: {what}; make one with: python -c 'import secrets; print(secrets.token_hex())'"
        )
    return tokens


def require_closed(host: str, tokens: Iterable[str]) -> None:
    """Refuse to listen beyond this machine without a token."""
    if host not in ("127.0.0.1", "::1", "localhost") and not tuple(tokens):
        raise RequestError(f"host {host} is reachable from other machines, but no token is set: give token_file, or host "
                           "127.0.0.1")  # fmt: skip


class TokenGate:
    """ASGI middleware: lets a request through when its token is known, or none is set."""

    def __init__(self, app: ASGIApp, tokens: tuple[str, ...]) -> None:
        self.app = app
        self.tokens = tuple(token.encode() for token in tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self.tokens or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = JSONResponse({"error": "a token is required: send it as Authorization: Bearer TOKEN"}, 401,
                               {"WWW-Authenticate": "Bearer"})  # fmt: skip
        await refusal(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] in OPEN_ROUTES and scope["method"] in ("GET", "HEAD"):
            return True
        given = presented_token(Headers(scope=scope).get("authorization", ""))
        # Every token is compared, so that the time says nothing about which one was near.
        matches = [hmac.compare_digest(given, token) for token in self.tokens]
        return any(matches)


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
