"""YAML is read strictly: no doubled key, no surprise in a scalar, every mistake with its line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.reading import read_mapping, read_value
from rlhf_ray.config.writing import write_mapping, write_value


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
    "text", ["no", "on", "yes", "off", "12:30", "010", "00.5", "=", "0x10", "2026-11-20", "12e4567", "1.2.3", "e5"]
)
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text):
    assert read_value(text) == text


def test_json_escapes_of_one_character_are_that_character():
    assert read_value(r'"a \ud83d\ude00"') == "a \U0001f600"
    assert read_mapping(r'{"name": "\ud83d"}').problems == [
        "line 1, column 10: not YAML: a text holds half of a surrogate pair"
    ]


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
    ("text", "message"),
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
def test_what_is_not_a_mapping_is_told_with_its_line(text, message):
    document = read_mapping(text)
    assert len(document.problems) == 1
    assert message in document.problems[0]
    assert document.values == {} or "a" in document.values


def test_nothing_but_plain_values_is_made(tmp_path):
    target = tmp_path / "built"
    document = read_mapping(f"a: !!python/object/apply:pathlib.Path.touch [{target}]")
    assert document.problems
    assert not target.exists()


@pytest.mark.parametrize("text", ["0o17", "0b101", "00", "007", "+010", "2026-1-2", "2026-11-20T10:00:00Z"])
def test_what_yaml_1_2_would_turn_into_a_number_or_a_date_stays_text_too(text):
    assert read_value(text) == text
    assert read_mapping(f"revision: {text}").values == {"revision": text}


def test_a_tag_can_ask_for_another_type():
    assert read_value("!!str 5") == "5"
    assert read_value("!!float 5") == 5.0


texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], include_characters="\n\t"), max_size=20)
keys = st.from_regex(r"[a-z_]{1,9}", fullmatch=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(keys, values, max_size=4))
def test_what_was_written_is_read_as_the_same_values(mapping):
    document = read_mapping(write_mapping(mapping))
    assert document.problems == []
    assert document.values == mapping
    assert repr(document.values) == repr(mapping), "the types too"


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "1e-5",
        "1e5",
        "010",
        "0x10",
        "2026-11-20",
        "12:30",
        "1_000",
        "true",
        "null",
        "~",
        "",
        "a: b",
        "# a",
        "<<",
        "=",
    ],
)
def test_a_text_that_looks_like_something_else_stays_text_when_it_is_written(text):
    assert read_mapping(write_mapping({"name": text})).values == {"name": text}
    assert read_value(write_value(text)) == text
    assert read_value(write_value([text, {"inner": text}])) == [text, {"inner": text}]


def test_the_page_about_configs_says_how_yaml_is_read():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    written = dict(
        re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \| (numbers|texts|a text|the number 1000|the only truth)", page, re.M)
    )
    types = {"numbers": float, "texts": str, "a text": str, "the number 1000": int, "the only truth": bool}
    assert set(written.values()) == set(types)
    for texts, what in written.items():
        for text in re.findall("`([^`]+)`", texts):
            assert type(read_value(text)) is types[what], text


@pytest.mark.parametrize(
    "value",
    [
        1e-08,
        1e22,
        2.5e-9,
        0.5,
        "no",
        "On",
        "y",
        "12:30",
        "1:2:3.5",
        "=",
        "0b11",
        "1e5",
        "010",
        "0x10",
        "2026-11-20",
        "null",
        "a b",
    ],
)
def test_readers_of_yaml_1_1_read_a_written_config_alike(value):
    for values in ({"a": value}, {"a": [value, {"b": value}]}):
        text = write_mapping(values)
        assert yaml.safe_load(text) == values
        assert read_mapping(text).values == values
