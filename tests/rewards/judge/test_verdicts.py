"""A number is read only from a reply that is nothing but one JSON object or one number in range; all else is a refusal."""

from __future__ import annotations

import pytest

from rlhf_ray.rewards.judge.verdicts import Refusal, Scale, read_score, read_scores

TEN = Scale(0.0, 10.0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7.0), (" 7.5\n", 7.5), ("0", 0.0), ("10", 10.0), ('{"score": 7}', 7.0),
        ('{"reason": "The 9 letters are right.", "score": 3.25}', 3.25), ('```json\n{"score": 2}\n```', 2.0),
        ('```\n{"score": 2}\n```', 2.0),
    ],
)  # fmt: skip
def test_a_number_in_range_is_read(text: str, score: float) -> None:
    assert read_score(text, TEN) == score


@pytest.mark.parametrize(
    "text",
    [
        "", "seven", "I give it 7.", "Score: 7", "7/10", "7 8", "11", "-1", "-0.001", "10.001", "1e1", "1e999", "NaN",
        "Infinity", "٧", "0x7", "7,5", "true", "null", '"7"', "[7]", "{}", '{"score": "7"}', '{"score": true}',
        '{"score": null}', '{"score": NaN}', '{"score": Infinity}', '{"score": 1e999}', '{"score": 11}',
        '{"score": -1}', '{"Score": 7}', '{"score": 7, "score": 8}', '{"score": [7]}', '{"score": {"value": 7}}',
        '{"score": 7} ok', 'ok {"score": 7}', '{"score": 7}{"score": 8}', "{'score': 7}", '{"score": 7',
        '```json\n{"score": 7}\n``` as asked', "[" * 100_000, '{"score": ' + "9" * 400 + "}", "9" * 400,
        '<think>7</think>{"score": 7}',
    ],
)  # fmt: skip
def test_every_other_reply_is_a_refusal_that_quotes_it(text: str) -> None:
    refusal = read_score(text, TEN)
    assert isinstance(refusal, Refusal), text[:50]
    assert repr(text.strip()[:120]) in refusal.reason and len(refusal.reason) < 400


def test_a_scale_may_begin_below_zero_and_its_ends_are_shares_0_and_1() -> None:
    scale = Scale(-5.0, 5.0)
    assert [scale.share(score) for score in (-5.0, 0.0, 5.0)] == [0.0, 0.5, 1.0]
    assert read_score("-5", scale) == -5.0 and isinstance(read_score("-5.1", scale), Refusal)


def test_all_parts_have_scores_or_none_has() -> None:
    parts = ("polite", "right")
    assert read_scores('{"scores": {"right": 3, "polite": 10}}', parts, TEN) == {"polite": 10.0, "right": 3.0}
    for text in (
        '{"scores": {"right": 3}}', '{"scores": {"right": 3, "polite": 10, "short": 1}}', '{"right": 3, "polite": 10}',
        '{"scores": {"right": 3, "polite": 11}}', '{"scores": {"right": 3, "polite": "10"}}', '{"scores": [3, 10]}', "3",
        '{"scores": {"right": 3, "right": 4, "polite": 10}}',
    ):  # fmt: skip
        assert isinstance(read_scores(text, parts, TEN), Refusal), text
