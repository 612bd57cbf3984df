"""The OpenAPI document of the service, written from what each protocol says of itself, and a page of it for people.

Always true: it names exactly the routes that exist; the page loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlhf_ray import __version__
from rlhf_ray.serving.protocol import Protocol
from rlhf_ray.serving.refusals import KINDS

OPERATING: Mapping[str, tuple[str, str | None]] = {
    "/health": ("200 while the process is up", None),
    "/ready": ("200 when the weights are loaded and gave a score in the last minute", None),
    "/info": ("what is served: models, versions, tokenizer, normalisation, limits", "application/json"),
    "/v1/models": ("the models in OpenAI's form", "application/json"),
    "/metrics": ("Prometheus text", "text/plain"),
    "/openapi.json": ("this description, for programs", "application/json"),
    "/docs": ("this description, for people", "text/html"),
}
REFUSED = (400, 408, 413, 415, 422, 429, 500, 503)
"""What a scoring route may answer besides scores; 401 and 404 say themselves."""


def document(protocols: Sequence[Protocol], *, open_routes: Collection[str]) -> dict[str, Any]:
    """The whole description."""
    paths: dict[str, Any] = {}
    for protocol in protocols:
        for path in protocol.paths:
            paths[path] = {"post": _scoring(protocol, path)}
    for path, (summary, media) in OPERATING.items():
        answer = {"description": summary, **({"content": {media: {}}} if media else {})}
        refused = {"503": {"description": "not ready"}} if path == "/ready" else {}
        told = {"summary": summary, "operationId": _identity(path), "responses": {"200": answer, **refused}}
        paths[path] = {"get": {**told, "security": []} if path in open_routes else {**told, **_guarded(told)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rlhf_ray scoring backend", "version": __version__},
        "paths": paths,
        "security": [{"bearer": []}, {"basic": []}],
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic", "description": "the token as the password"},
            }
        },
    }


def _scoring(protocol: Protocol, path: str) -> dict[str, Any]:
    answer = {"description": "scores", "content": {"application/json": {"schema": protocol.response}}}
    schema = dict(protocol.request)
    example = schema.pop("example")
    refusals = {str(status): _refusal(status) for status in (*REFUSED, 401, 404)}
    return {
        "summary": protocol.summary,
        "operationId": _identity(path),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}},
        "responses": {"200": answer, **refusals},
    }


def _refusal(status: int) -> dict[str, Any]:
    kinds = {kind: meaning for kind, (at, meaning) in KINDS.items() if at == status}
    told = "; ".join(f"{kind}: {meaning}" for kind, meaning in kinds.items())
    return {"description": told, "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}}}


def _guarded(told: Mapping[str, Any]) -> dict[str, Any]:
    return {"responses": {**told["responses"], "401": _refusal(401)}}


def _identity(path: str) -> str:
    return path.strip("/").replace("/", "_").replace(".", "_")


def page(described: Mapping[str, Any]) -> str:
    """The description as one page of HTML."""
    parts = [f"<h1>{html.escape(described['info']['title'])} {html.escape(described['info']['version'])}</h1>"]
    parts.append('<p>Send a token as <code>Authorization: Bearer TOKEN</code>. For programs: <a href="openapi.json">'
                 "openapi.json</a></p>")  # fmt: skip
    for path, methods in described["paths"].items():
        for method, told in methods.items():
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(told['summary'])}</p>")
            if body := told.get("requestBody"):
                content = body["content"]["application/json"]
                parts.append(f"<p>For example:</p><pre>{_json(content['example'])}</pre>")
                parts.append(f"<details><summary>body</summary><pre>{_json(content['schema'])}</pre></details>")
                answer = told["responses"]["200"]["content"]["application/json"]["schema"]
                parts.append(f"<details><summary>answer</summary><pre>{_json(answer)}</pre></details>")
    parts.append("<h2>Refusals</h2><table>")
    parts += [f"<tr><td>{kind}</td><td>{at}</td><td>{meaning}</td></tr>" for kind, (at, meaning) in KINDS.items()]
    return f"<!doctype html><meta charset='utf-8'><title>scoring</title>{''.join(parts)}</table>"


def _json(value: Any) -> str:
    return html.escape(json.dumps(value, indent=1, ensure_ascii=False))
