"""The page of the service as one HTML document, and the headers that a browser is to hold it to.

Invariants: the document is the same for every service: it holds nothing of what is served, no text of a caller and no token, so
that it may be given to somebody without one; whatever it shows comes over routes that stand behind the token gate. It loads
nothing: its script and its stylesheet are in it, and a browser runs no other, since the policy names their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_ray.monitoring.report.templates import STYLE

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Document:
    """A page and the headers of its answer."""

    html: str
    headers: Mapping[str, str]


@cache
def document(*, asks_for_token: bool) -> Document:
    """The page; with ``asks_for_token`` it shows a field for a token before it asks the service for anything."""
    style = STYLE.read_text(encoding="utf-8") + (FOLDER / "style.css").read_text(encoding="utf-8")
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("page.html").render(
        style=Markup(style), script=Markup(script), asks_for_token=asks_for_token
    )
    return Document(html, _headers(policy(style=style, script=script)))


def policy(*, style: str, script: str) -> str:
    """The content security policy of a page whose only stylesheet and script are these."""
    directives = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",  # the empty icon, without which a browser asks for one
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _headers(content_security_policy: str) -> Mapping[str, str]:
    return {
        "Content-Security-Policy": content_security_policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
