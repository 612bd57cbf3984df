"""One class is the reader of a body and its schema: what is read is of the schema, and what is refused is said by key and
type, whatever the type of whatever field, without the value.
"""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from rlhf_ray.serving.protocols.fields import Body
from rlhf_ray.serving.protocols.openapi import request_schema
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.registry import PROTOCOLS
from rlhf_ray.serving.refusals import Refusal

from .fuzz import Sender

SECRET = "my-secret-text"
VALUES: tuple[Any, ...] = (
    None, True, 5, 0.5, SECRET, [], [SECRET], [5], [[SECRET]], [[5]], [[0.5]], [{}], {}, {"text": SECRET}, [{"text": 5}],
    [{"role": SECRET}], [{"role": "user", "content": SECRET}],
    [{"role": "user", "content": "a", f"{SECRET}\ud800": 1}], [[SECRET] * 3], [SECRET, 5], [5, SECRET],
)  # fmt: skip
FORMS = [form for protocol in PROTOCOLS for form in protocol.bodies if form.example]
FIELDS = [(form, name) for form in FORMS for name in form.model_fields]


def by_name(name: str) -> Protocol:
    return next(protocol for protocol in PROTOCOLS if protocol.name == name)


@pytest.mark.parametrize(("form", "name"), FIELDS, ids=[f"{form.__name__}.{name}" for form, name in FIELDS])
def test_a_field_of_any_type_is_read_or_refused_by_its_name_without_its_value(form: type[Body], name: str) -> None:
    refused = 0
    for value in VALUES:
        try:
            form.read({**form.example, name: value})
        except Refusal as refusal:
            refused += 1
            assert name in str(refusal) and SECRET not in str(refusal)
            assert refusal.status == 422
    assert refused > 0 or form.model_fields[name].annotation is Any


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_example_of_every_form_is_read(form: type[Body]) -> None:
    assert form.claims(form.example) and form.read(form.example).items


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_missing_field_is_told_with_what_it_must_be(form: type[Body]) -> None:
    for name, field in form.model_fields.items():
        if field.is_required():
            values = {key: value for key, value in form.example.items() if key != name}
            with pytest.raises(Refusal, match=rf"^{name} must be {field.title}, not nothing$|^\w+ must be"):
                form.read(values)
            assert field.title, f"{form.__name__}.{name} needs a title for this sentence"


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_what_is_read_is_of_the_documented_schema(protocol: Protocol) -> None:
    validator = jsonschema.Draft202012Validator(request_schema(protocol))
    sender, read = Sender(seed=3), 0
    for _ in range(400):
        body = sender.spoil(dict(protocol.bodies[0].example))
        if not isinstance(body, dict):
            continue
        try:
            parsed = protocol.read(body)
        except Refusal:
            continue
        if protocol.name == "reward" and any(not hasattr(item, "texts") for item in parsed.items):
            continue  # an item that is not well formed is read, and fails alone
        read += 1
        errors = list(validator.iter_errors(body))
        assert not errors, (body, errors[0].message)
    assert read > 20


def test_a_list_is_read_only_up_to_its_first_error() -> None:
    wrong = [5] * 100_000
    for name, key in (("openrlhf", "query"), ("rerank", "documents"), ("classify", "messages")):
        protocol = by_name(name)
        (error,) = _errors(protocol.bodies[-1], {**protocol.bodies[-1].example, key: wrong})
        assert error["loc"][0] == key


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("reward", {"items": [{}] * 6}),
        ("openrlhf", {"query": [5] * 6}),
        ("classify", {"input": [{}] * 6}),
        ("score", {"text_1": "a", "text_2": [5] * 6}),
        ("rerank", {"query": "a", "documents": [5] * 6}),
        ("predict", {"inputs": [[]] * 6}),
        ("rerank_or_tei", {"query": "a", "texts": [5] * 6}),
    ],
)
def test_too_many_items_are_refused_before_any_of_them_is_read(name: str, body: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        by_name(name).read(body, max_items=5)
    assert (caught.value.status, str(caught.value)) == (413, "6 items in one request, the limit is 5")


def test_token_ids_are_one_item_however_many() -> None:
    assert len(by_name("classify").read({"input": [5] * 6}, max_items=5).items) == 1


def _errors(form: type[Body], values: dict[str, Any]) -> list[Any]:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        form.model_validate(values)
    assert SECRET not in str(caught.value)
    return caught.value.errors()


def test_a_conversation_keeps_the_other_keys_of_its_turns() -> None:
    turn = {"role": "assistant", "content": "a", "name": "Ada", "tool_calls": [{"id": 1}]}
    (item,) = by_name("classify").read({"messages": [turn]}).items
    assert item.messages == (turn,)
