"""An override reaches exactly the key that it names; nothing in the wrong form is dropped in silence."""

from __future__ import annotations

import pytest

from rlhf_ray.config.overrides import apply_overrides
from rlhf_ray.config.reading import read_mapping


def apply(text, *overrides):
    document = read_mapping(text)
    apply_overrides(document, overrides)
    return document


def test_scalars_lists_sections_and_null():
    document = apply("a: {b: 1}", "a.b=2", "a.c=[1, 2]", "d.e.f=x=y", "g={h: 1e-5}", "i=", "j=null", "k='1'")
    assert document.problems == []
    assert document.values == {
        "a": {"b": 2, "c": [1, 2]}, "d": {"e": {"f": "x=y"}}, "g": {"h": 1e-5}, "i": None, "j": None, "k": "1",
    }  # fmt: skip


def test_a_later_override_wins():
    assert apply("a: 1", "a=2", "a=3").values == {"a": 3}


def test_a_shared_section_is_overridden_in_one_place_only():
    assert apply("a: &x {n: 1}\nb: *x", "a.n=2").values == {"a": {"n": 2}, "b": {"n": 1}}


def test_a_section_opens_where_there_was_null():
    assert apply("a: null", "a.b=1").values == {"a": {"b": 1}}


def test_origins_move_to_the_command_line():
    document = apply("a:\n  b: {c: 1}\n  d: 2", "a.b={e: 1}", "x.y=1")
    assert document.origin("a.b.e") == "command line"
    assert document.origin("a.d") == "line 3"
    assert document.origin("x") == "command line"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "steps: not an override: write key=value, such as run.seed=1"),
        ("=3", "=3: not an override: the key '' has an empty part; write section.key=value"),
        ("a..b=3", "a..b=3: not an override: the key 'a..b' has an empty part; write section.key=value"),
        ("a.b.c=1", "a.b.c: a.b is the value 1, which has no keys of its own"),
        ("--sed=3", "--sed: settings are written key=value, without dashes, such as run.seed=1"),
        ("--run.seed=3", "--run.seed: settings are written key=value, without dashes, such as run.seed=3"),
        ("a=[1", "a: '[1' is while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_what_is_not_an_override_is_told(override, message):
    document = apply("a: {b: 1}", override)
    assert len(document.problems) == 1
    assert document.problems[0].startswith(message)
    assert document.values == {"a": {"b": 1}}
