"""A text of any content is read or refused in one sentence, in little time: nested, aliased, long, or of endless numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.reading import LONGEST, read_mapping, read_value
from rlhf_ray.errors import ConfigError

SECONDS = 2.0
"""Of processor time; the bombs would take hours."""


@pytest.fixture(autouse=True)
def in_little_time() -> Iterator[None]:
    """Nothing here takes longer than ``SECONDS``: what does is interrupted."""

    def interrupt(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    signal.signal(signal.SIGPROF, before)


def aliases(levels: int, form: Callable[[str], str]) -> str:
    """Levels that each name the one before nine times."""
    names = [f"n{level}" for level in range(levels)]
    lines = [f"{names[0]}: &{names[0]} {{x: 1}}"]
    lines += [f"{new}: &{new} {form(', '.join([f'*{old}'] * 9))}" for old, new in pairwise(names)]
    return "\n".join([*lines, f"kind: *{names[-1]}"])


def doubled(parts: str) -> str:
    name = parts.partition(",")[0]
    return f"{{a: {name}, b: {name}}}"


HOSTILE = {
    "lists of aliases": (aliases(9, lambda parts: f"[{parts}]"), "more than 20000 values with its aliases"),
    "merged aliases": (aliases(9, lambda parts: f"{{<<: [{parts}]}}"), "more than 20000 values with its aliases"),
    "aliases in mappings": (aliases(40, doubled), "more than 20000"),
    "an alias of what is around it": ("kind: &a [*a]", "an alias stands inside of what it names"),
    "an alias of a mapping around it": ("kind: &a {b: {<<: *a}}", ""),
    "nested lists": ("kind: " + "[" * 5000 + "]" * 5000, "nested too deep"),
    "nested mappings": ("kind: " + "{a: " * 5000 + "1" + "}" * 5000, "nested too deep"),
    "nested blocks": ("\n".join(" " * level + "a:" for level in range(1200)), "nested too deep"),
    "open lists": ("[" * 5000, "nested too deep"),
    "a number of 5,000 digits": (f"kind: {'9' * 5000}", "cannot be read: Exceeds the limit (4300 digits)"),
    "a number of 5,000 digits in a list": (f"kind: [-{'9' * 5000}]", "cannot be read: Exceeds the limit (4300 digits)"),
    "a long text": ("kind: " + "x" * LONGEST, "a config has 1048576 at most"),
    "a control character": ("kind: \x00", "not YAML"),
    "a tag": ("kind: !!python/object/apply:os.system [true]", "the tag"),
    "a list": (f"- {'x' * 5000}", "a config is a mapping of keys to values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_is_read_or_refused_in_little_time(name: str) -> None:
    text, message = HOSTILE[name]
    try:
        document = read_mapping(text)
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {str(error)[:100]}")
    problems = "\n".join(document.problems)
    assert message in problems and (problems or not message)
    assert len(problems) < 500, "what is wrong is not repeated at length"
    if message:
        with pytest.raises(ConfigError):
            parse_config(text)


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 5000, "x" * (LONGEST + 1), "{a: " * 3000 + "}" * 3000])
def test_so_is_a_value_of_the_command_line(text: str) -> None:
    try:
        read_value(text)
    except ValueError:
        pass
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {str(error)[:100]}")
    with pytest.raises(ConfigError) as caught:
        parse_config("kind: sft", [f"steps={text}"])
    assert len(str(caught.value)) < 6000


def test_what_a_config_needs_of_aliases_is_read() -> None:
    document = read_mapping("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n")
    assert document.problems == []
    assert document.values["b"] == {"x": 2, "y": [1, 2]} and document.values["c"][1] == {"x": 1, "y": [1, 2]}
