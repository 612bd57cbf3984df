"""YAML is read strictly: no doubled key, no surprise in a scalar, every mistake with its line."""

from __future__ import annotations

import math

import pytest

from rlhf_ray.config.reading import read_mapping, read_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("3", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("[1, a, 2.0]", [1, "a", 2.0]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_plain_values(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["no", "on", "yes", "off", "12:30", "010", "0x10", "2026-11-20", "12e4567", "1.2.3", "e5"]
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text):
    assert read_value(text) == text


def test_infinity_and_nan_are_numbers():
    assert read_value(".inf") == math.inf
    assert math.isnan(read_value(".nan"))


def test_a_doubled_key_names_both_lines():
    document = read_mapping("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    assert document.problems == ["b.c: stands twice, on line 3 and on line 5; remove one"]


def test_keys_know_their_lines():
    document = read_mapping("a: 1\nb:\n  c: {d: 2}\n")
    assert document.origins == {"a": "line 1", "b": "line 2", "b.c": "line 3", "b.c.d": "line 3"}
    assert document.origin("b.c.d.e") == "line 3"
    assert document.origin("x.y") == ""


def test_aliases_and_merges_give_values_of_their_own():
    values = read_mapping("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n").values
    assert values == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert values["a"] is not values["b"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: b: c", "line 1, column 5: not YAML: mapping values are not allowed here"),
        ("a:\n\t- c", "line 2, column 1: not YAML"),
        ("a: 1\nb: [1, 2", "line 2"),
        ("a: &x [*x]", "line 1"),
        ("a: *nobody", "undefined alias 'nobody'"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: !!python/object/apply:os.getcwd []", "line 1"),
        ("? [1, 2]\n: 3", "a key is one word"),
        ("- 1\n- 2", "a config is a mapping of keys to values"),
        ("just words", "a config is a mapping of keys to values"),
    ],
)
def test_what_is_not_a_mapping_is_told_with_its_line(text, told):
    document = read_mapping(text)
    assert len(document.problems) == 1
    assert told in document.problems[0]
    assert document.values == {} or "a" in document.values


def test_nothing_but_plain_values_is_made(tmp_path):
    target = tmp_path / "made"
    document = read_mapping(f"a: !!python/object/apply:pathlib.Path.touch [{target}]")
    assert document.problems
    assert not target.exists()
