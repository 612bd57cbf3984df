"""The OpenAPI document of the service, made from its protocols, and the same as a page for people.

Invariants: it names exactly the routes that exist; the schemas are those that read the bodies and type the answers; the
page loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from rlhf_ray import __version__
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.refusals import KINDS

OPERATING: Mapping[str, tuple[str, str | None]] = {
    "/": ("a page that scores two answers side by side, for people; without it where page is false", "text/html"),
    "/health": ("200 while the process is up", None),
    "/ready": ("200 when the weights are loaded and gave a score in the last minute", None),
    "/info": ("what is served: models, versions, tokenizer, normalisation, limits", "application/json"),
    "/v1/models": ("the models in OpenAI's form", "application/json"),
    "/metrics": ("Prometheus text", "text/plain"),
    "/openapi.json": ("this description, for programs", "application/json"),
    "/docs": ("this description, for people", "text/html"),
}
"""What the routes that score nothing answer, and its media type."""
REFUSED = (400, 408, 413, 415, 422, 429, 500, 503)
"""What a scoring route may answer besides scores; 401 and 404 are added to every route that has them."""


def document(
    protocols: Sequence[Protocol], *, operating: Collection[str] = OPERATING, open_routes: Collection[str]
) -> dict[str, Any]:
    """The whole description; of the routes that score nothing there are ``operating``, and ``open_routes`` need no token."""
    paths: dict[str, Any] = {}
    for protocol in protocols:
        for path in protocol.paths:
            paths[path] = {"post": _scoring(protocol, path)}
    for path in operating:
        paths[path] = {"get": _operating(path, is_open=path in open_routes)}
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


def request_schema(protocol: Protocol) -> dict[str, Any]:
    """The JSON schema of a protocol's bodies."""
    schemas = [_inlined(form.model_json_schema(schema_generator=_Schemas)) for form in protocol.bodies]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def answer_schema(protocol: Protocol) -> dict[str, Any]:
    """The JSON schema of a protocol's answers."""
    return _inlined(TypeAdapter(protocol.answer).json_schema(schema_generator=_Schemas, mode="serialization"))


class _Schemas(GenerateJsonSchema):
    """Schemas without the titles that pydantic makes of names, and without defaults: most are null or an empty list."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        described = super().tagged_union_schema(schema)
        described["anyOf"] = described.pop("oneOf")  # an empty list is of several branches
        return described


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with each definition in the place of its reference, which would point out of an OpenAPI document."""
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inline({**definitions[value["$ref"].rpartition("/")[2]], **_without_reference(value)})
        return {key: inline(one) for key, one in value.items()}

    inlined: dict[str, Any] = inline(schema)
    return inlined


def _without_reference(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "$ref"}


def _scoring(protocol: Protocol, path: str) -> dict[str, Any]:
    answer = {"description": "scores", "content": {"application/json": {"schema": answer_schema(protocol)}}}
    body = {"schema": request_schema(protocol), "example": protocol.bodies[0].example}
    refusals = {str(status): _refusal(status) for status in (*REFUSED, 401, 404)}
    return {
        "summary": protocol.summary,
        "operationId": _identity(path),
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": answer, **refusals},
    }


def _operating(path: str, *, is_open: bool) -> dict[str, Any]:
    summary, media = OPERATING[path]
    responses: dict[str, Any] = {"200": {"description": summary, **({"content": {media: {}}} if media else {})}}
    if path == "/ready":
        responses["503"] = {"description": "not ready"}
    if not is_open:
        responses["401"] = _refusal(401)
    operation = {"summary": summary, "operationId": _identity(path), "responses": responses}
    return {**operation, "security": []} if is_open else operation


def _refusal(status: int) -> dict[str, Any]:
    kinds = {kind: meaning for kind, (code, meaning) in KINDS.items() if code == status}
    description = "; ".join(f"{kind}: {meaning}" for kind, meaning in kinds.items())
    schema = {"type": "object", "required": ["error"]}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _identity(path: str) -> str:
    return path.strip("/").replace("/", "_").replace(".", "_") or "page"


def page(description: Mapping[str, Any]) -> str:
    """The description as one page of HTML."""
    parts = [f"<h1>{html.escape(description['info']['title'])} {html.escape(description['info']['version'])}</h1>"]
    parts.append('<p>Send a token as <code>Authorization: Bearer TOKEN</code>. For programs: <a href="openapi.json">'
                 "openapi.json</a></p>")  # fmt: skip
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['summary'])}</p>")
            if body := operation.get("requestBody"):
                content = body["content"]["application/json"]
                parts.append(f"<p>For example:</p><pre>{_json(content['example'])}</pre>")
                parts.append(f"<details><summary>body</summary><pre>{_json(content['schema'])}</pre></details>")
                answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
                parts.append(f"<details><summary>answer</summary><pre>{_json(answer)}</pre></details>")
    parts.append("<h2>Refusals</h2><table>")
    parts += [f"<tr><td>{kind}</td><td>{code}</td><td>{meaning}</td></tr>" for kind, (code, meaning) in KINDS.items()]
    return f"<!doctype html><meta charset='utf-8'><title>scoring</title>{''.join(parts)}</table>"


def _json(value: Any) -> str:
    return html.escape(json.dumps(value, indent=1, ensure_ascii=False))
