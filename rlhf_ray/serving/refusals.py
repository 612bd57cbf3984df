"""Refusals: what a request without scores is answered, as a status, a kind for programs and a sentence for people.

Invariants: a kind has one status, whatever the protocol; what may pass is 503 with Retry-After, since clients of other
frameworks give up for good at any 4xx, and 429 only where one key is beyond its own limit; no sentence holds a text of the
caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.errors import RequestError

KINDS: Mapping[str, tuple[int, str]] = {
    "not_json": (400, "the body is not JSON"),
    "too_deep": (400, "the body is nested too deeply"),
    "upgrade": (400, "the request asks for another protocol on its connection"),
    "token_required": (401, "no token, or one that is not known"),
    "not_found": (404, "there is no such route"),
    "unknown_model": (404, "no model of that name is served"),
    "method_not_allowed": (405, "the route exists, but not for this method"),
    "slow_body": (408, "the body did not arrive in time"),
    "body_too_large": (413, "the body has more bytes, or more texts, lists and objects, than are read"),
    "too_many_items": (413, "the body has more items than one request may hold"),
    "compressed": (415, "the body is compressed"),
    "wrong_body": (422, "a key is missing, or its value is not of the form that it must have"),
    "unsupported": (422, "the body asks for what is not served"),
    "item": (422, "an item cannot be scored as it is: empty, too long, outside the vocabulary"),
    "rate_limited": (429, "this key has sent more requests than its share"),
    "model": (500, "the model gave no finite number"),
    "server": (500, "the server failed"),
    "overloaded": (503, "the queue is full"),
    "source": (503, "the reward group failed and did not come back in time"),
    "stopping": (503, "the service stops"),
}
"""Status and meaning of every kind."""

RETRY_AFTER_S: Mapping[str, int] = {"rate_limited": 5, "overloaded": 1, "source": 5, "stopping": 5}


class Refusal(RequestError):
    """Why a request gets no scores."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = KINDS[kind][0]
        self.retry_after_s = RETRY_AFTER_S.get(kind)


def plain(refusal: Refusal) -> Any:
    """The body of a refusal on this project's own routes."""
    return {"error": str(refusal), "kind": refusal.kind}


def as_openai(refusal: Refusal) -> Any:
    """The body of a refusal in the form of OpenAI's and vLLM's interfaces."""
    return {"error": {"message": str(refusal), "type": refusal.kind, "param": None, "code": refusal.status}}


def as_tei(refusal: Refusal) -> Any:
    """The body of a refusal in the form of text-embeddings-inference."""
    names = {"item": "Tokenizer", "overloaded": "Overloaded", "source": "Unhealthy"}
    default = "Validation" if refusal.status < 500 else "Backend"
    return {"error": str(refusal), "error_type": names.get(refusal.kind, default), "kind": refusal.kind}
