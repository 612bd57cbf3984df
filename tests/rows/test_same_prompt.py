"""Prompts are the same but for how they are written, and never where a symbol or a number differs."""

from __future__ import annotations

import pytest

from rlhf_ray.rows.same_prompt import hash_prompt


def same(one: object, other: object, *, nearly: bool) -> bool:
    return hash_prompt(one, nearly=nearly) == hash_prompt(other, nearly=nearly)  # type: ignore[arg-type]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is it late?", "is it late"),
        ("Is it  late?", "Is it\nlate ?"),
        ("ﬁne, caf\u00e9", "Fine, cafe\u0301"),
        ("Straße", "STRASSE"),
        ("Is it late?", [turn("user", "IS IT LATE")]),
        ([turn("system", "Be brief."), turn("user", "Hi!")], [turn("system", "be  brief"), turn("user", "hi")]),
    ],
)
def test_nearly_the_same(one: object, other: object) -> None:
    assert same(one, other, nearly=True)
    assert not same(one, other, nearly=False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2 + 3", "2 - 3"),
        ("x < 1", "x > 1"),
        ("12", "1 2"),
        ("?yes", "yes"),
        ("a", [turn("assistant", "a")]),
        ([turn("user", "a")], [turn("user", "a"), turn("user", "a")]),
    ],
)
def test_different_prompts_stay_different(one: object, other: object) -> None:
    assert not same(one, other, nearly=True)


def test_blanks_around_a_prompt_never_count_and_tools_do() -> None:
    assert same(" a\n", "a", nearly=False)
    assert same("a", [turn("user", "a")], nearly=False)
    tools = [{"name": "f"}]
    messages = [turn("user", "a")]
    assert hash_prompt(messages, tools) != hash_prompt(messages)
