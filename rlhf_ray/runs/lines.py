"""What a line of each record of a run must hold, so that whoever reads a run that somebody edited is told which line is wrong.

Invariant: of a line without a problem every key that this project reads is there and has a value that can be computed with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 10**15
"""Of a step or the number of an attempt."""
LATEST = 10.0**11
"""Of a time, in seconds since 1970: four digits of a year are enough."""


def metrics_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line of ``metrics.jsonl``; empty if nothing is."""
    wrong = [name for name, value in line.items() if value is not None and not _is_number(value)]
    return count_problem(line, "step") or _time_problem(line) or (not_a(line, wrong[0], "a number") if wrong else "")


def attempt_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line of ``attempts.jsonl``; empty if nothing is."""
    counts = count_problem(line, "attempt") or count_problem(line, "from_step")
    if "stopped" in line and (problem := number_problem(line, "stopped")):
        return problem
    return counts or _time_problem(line) or _changes_problem(line, "changes") or _changes_problem(line, "accepted")


def ledger_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line of ``ledger.jsonl``; empty if nothing is."""
    prompts = line.get("prompt_ids")
    if not isinstance(prompts, list) or not all(_is_count(prompt) for prompt in prompts):
        return not_a(line, "prompt_ids", "a list of whole numbers")
    return count_problem(line, "step") or count_problem(line, "attempt")


def sample_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line of a step's samples; empty if nothing is."""
    for name in ("prompt", "response"):
        if not isinstance(line.get(name), str):
            return not_a(line, name, "a text")
    tokens = line.get("tokens", {"text": []})
    if not isinstance(tokens, dict) or not isinstance(texts := tokens.get("text"), list):
        return not_a(line, "tokens", "a mapping with the texts of the tokens")
    numbers = [column for name, column in tokens.items() if name != "text"]
    is_right = all(isinstance(text, str) for text in texts) and all(
        isinstance(column, list) and all(one is None or _is_number(one) for one in column) for column in numbers
    )
    if not is_right:
        return not_a(line, "tokens", "texts, and numbers for each of them")
    return "" if _is_number(line.get("score")) else not_a(line, "score", "a number")


def _changes_problem(line: Mapping[str, Any], key: str) -> str:
    changes = line.get(key, [])
    is_right = isinstance(changes, list) and all(
        isinstance(one, dict) and isinstance(one.get("key"), str) and {"from", "to"} <= one.keys() for one in changes
    )
    return "" if is_right else not_a(line, key, "a list of key, from and to")


def count_problem(line: Mapping[str, Any], key: str) -> str:
    """What is wrong with a value that must be a whole number from 0 on; empty if nothing is."""
    return "" if _is_count(line.get(key)) else not_a(line, key, "a whole number")


def number_problem(line: Mapping[str, Any], key: str) -> str:
    """What is wrong with a value that must be a number from 0 on; empty if nothing is."""
    value: Any = line.get(key)
    return "" if _is_number(value) and value >= 0 else not_a(line, key, "a number from 0 on")


def _time_problem(line: Mapping[str, Any]) -> str:
    time: Any = line.get("timestamp")
    is_time = _is_number(time) and 0 <= time < LATEST
    return "" if is_time else not_a(line, "timestamp", "a time in seconds")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def not_a(line: Mapping[str, Any], key: str, wanted: str) -> str:
    """Say that a value is missing, or not what is ``wanted``."""
    if key not in line:
        return f"it has no {key}"
    shown = ascii(line[key])
    return f"{ascii(key)[1:-1]} is {shown if len(shown) <= 40 else shown[:40] + ' ...'}, not {wanted}"
