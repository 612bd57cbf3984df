"""Read what a judge replied: scores in a stated range, or which of two answers is better.

Invariants: a number is read only from a reply that is nothing but one JSON object, or nothing but one number, and lies in the
range that was stated; which answer is better only from one JSON object that says so in one of three words. Every other reply is
a :class:`Refusal` that quotes it. No number is looked for inside of prose, moved into the range, or filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

SCORE, SCORES, BETTER = "score", "scores", "better"
"""The fields of a reply."""
FIRST, SECOND, TIE = "first", "second", "tie"
"""What a judge may say of two answers."""
_SHARES = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")
_QUOTED = 120


@dataclass(frozen=True)
class Refusal:
    """Why a reply holds no verdict, in words that go after "the judge"."""

    reason: str


@dataclass(frozen=True)
class Scale:
    """The range of scores: ``low`` is the worst, ``high`` the best."""

    low: float
    high: float

    def share(self, score: float) -> float:
        """The score as a share of the range, from 0 to 1."""
        return (score - self.low) / (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


def read_score(text: str, scale: Scale) -> float | Refusal:
    """The score in ``{"score": N, ...}``, or the number that the reply is."""
    plain = text.strip()
    if _NUMBER.fullmatch(plain):
        return _in_range(float(plain), plain, scale, text)
    reply = _read_object(text)
    if isinstance(reply, Refusal):
        return reply
    if SCORE not in reply:
        return _refuse(f"gave no {SCORE!r}", text)
    return _number(reply[SCORE], scale, text)


def read_scores(text: str, parts: Collection[str], scale: Scale) -> dict[str, float] | Refusal:
    """The score of each part in ``{"scores": {PART: N, ...}, ...}``; all of them, or none."""
    reply = _read_object(text)
    if isinstance(reply, Refusal):
        return reply
    given = reply.get(SCORES)
    if not isinstance(given, Mapping) or given.keys() != {*parts}:
        return _refuse(f"gave no {SCORES!r} of exactly {', '.join(parts)}", text)
    scores: dict[str, float] = {}
    for part in parts:
        score = _number(given[part], scale, text)
        if isinstance(score, Refusal):
            return score
        scores[part] = score
    return scores


def read_better(text: str) -> float | Refusal:
    """The share of the win that the first of two answers has, from ``{"better": "first", ...}``: 1, 0, or a half for a tie."""
    reply = _read_object(text)
    if isinstance(reply, Refusal):
        return reply
    better = reply.get(BETTER)
    if not isinstance(better, str) or better not in _SHARES:
        return _refuse(f"gave no {BETTER!r} of {FIRST}, {SECOND} and {TIE}", text)
    return _SHARES[better]


def _read_object(text: str) -> Mapping[str, Any] | Refusal:
    """The one JSON object that the reply is, also between the marks of a block of code."""
    plain = text.strip()
    fenced = _FENCED.fullmatch(plain)
    try:
        reply = json.loads(fenced[1] if fenced else plain, object_pairs_hook=_once_each, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return _refuse("replied no JSON object", text)
    return reply if isinstance(reply, dict) else _refuse("replied no JSON object", text)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A field that stands there twice has no one value."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field stands there twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _number(value: Any, scale: Scale, text: str) -> float | Refusal:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _refuse("gave a score that is no number", text)
    return _in_range(value, f"{value}"[:20], scale, text)


def _in_range(score: float, shown: str, scale: Scale, text: str) -> float | Refusal:
    if not scale.low <= score <= scale.high:  # a whole number may be too long for a float, but not for this
        return _refuse(f"gave {shown}, which is not from {scale}", text)
    return float(score)


def _refuse(what: str, text: str) -> Refusal:
    quoted = text.strip()[:_QUOTED]
    return Refusal(f"{what}: {quoted!r}{'...' if len(text.strip()) > _QUOTED else ''}")
