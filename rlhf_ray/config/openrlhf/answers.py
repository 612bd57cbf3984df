"""What is said to somebody who writes a flag of OpenRLHF: the key that it is called here, or that it has no counterpart.

Invariants: a flag is looked up under its whole name, never by its first part; a key that the job at hand has is never taken
for a flag.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rlhf_ray.config.openrlhf.flags import FLAGS, Answer
from rlhf_ray.config.openrlhf.older import GONE, RENAMED
from rlhf_ray.config.reading import SEPARATOR

SECTIONS: Mapping[str, str] = {
    "actor": "policy",
    "ref": "reference",
    "algo": "algorithm",
    "vllm": "rollout",
    "ds": "ROLE.engine and ROLE.model",
    "ckpt": "checkpoint and run",
    "eval": "evaluation and data",
    "logger": "monitoring",
    "train": "batch, run and the sections of the roles",
    "adam": "ROLE.engine.optimizer",
    "muon": "ROLE.engine.optimizer",
}
"""First parts of flags that are no sections of a job, with the sections that have their counterparts."""

CLOSE = 0.7
"""How much of a name and a flag must agree for one to be a misspelling of the other, from 0 to 1 (difflib's ratio)."""

UNKNOWN = "no flag of OpenRLHF 0.11.2 is called so"


def plain_name(key: str) -> str:
    """A key as flags are named: without dashes before it, with underscores inside."""
    return key.lstrip("-").replace("-", "_")


def is_flag(key: str) -> bool:
    """Whether ``key``, with or without dashes, is the whole name of a flag."""
    return _find(plain_name(key)) is not None


def take_flags(values: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """``values`` without flags, and for each flag its key as it was written and what is said to it.

    ``known`` are the keys of the job. A section in which only flags were written is left out too.
    """
    problems: list[tuple[str, str]] = []
    return _without_flags(values, "", known, problems), problems


def hint(name: str, known: Collection[str], role: str | None = None) -> str:
    """The answer to the last part ``name`` of a key behind a section of ours, as in ``batch.train_batch_size``.

    Empty for a name that is none, or whose counterpart the job with the keys ``known`` does not have. ``role`` is the role in
    whose section the key stands.
    """
    plain = plain_name(name)
    answer = GONE.get(plain) or FLAGS.get(RENAMED.get(plain, ""))
    if answer is None or not (list(_places(answer.keys, known, role)) if answer.keys else "_" in plain):
        return ""
    return say(plain, answer, known, role)


def say(name: str, answer: Answer, known: Collection[str], role: str | None = None) -> str:
    """The answer to the flag ``name`` as a sentence."""
    note = f" ({answer.note})" if answer.note else ""
    if not answer.keys:
        return f"OpenRLHF's {name} has no counterpart here: {answer.note}; remove it"
    places = list(_places(answer.keys, known, role))
    if places:
        return f"OpenRLHF's {name} is {' and '.join(places)} here{note}"
    if answer.keys == (name,):
        return f"{name} is a key of other kinds of job, for which this kind has no counterpart; remove it"
    elsewhere = " and ".join(key.replace("|", " or ") for key in answer.keys)
    return f"OpenRLHF's {name} is {elsewhere}{note}, for which this kind of job has no counterpart; remove it"


def _find(name: str) -> Answer | None:
    return FLAGS.get(name) or GONE.get(name) or FLAGS.get(RENAMED.get(name, ""))


def _without_flags(
    values: Mapping[str, Any], at: str, known: Collection[str], problems: list[tuple[str, str]]
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{at}{SEPARATOR}{name}" if at else str(name)
        plain = plain_name(path)
        is_section = isinstance(value, dict) and bool(value)
        answer = None if is_section or path in known else _find(plain)
        if answer is not None:
            problems.append((path, say(plain, answer, known)))
            continue
        if is_section:
            inner = _without_flags(value, path, known, problems)
            if inner:
                kept[name] = inner
            continue
        first = plain.partition(SEPARATOR)[0]
        if first in SECTIONS and first not in known:
            problems.append((path, _say_to_unknown(plain, first, known)))
        else:
            kept[name] = value
    return kept


def _say_to_unknown(name: str, first: str, known: Collection[str]) -> str:
    """What is said to a name under a section that only OpenRLHF has."""
    inside = {flag.removeprefix(first + SEPARATOR): flag for flag in FLAGS if flag.startswith(first + SEPARATOR)}
    written = name.removeprefix(first + SEPARATOR)
    same_end = [rest for rest in inside if rest.endswith(SEPARATOR + written)]
    close = [inside[rest] for rest in same_end or difflib.get_close_matches(written, inside, n=3, cutoff=CLOSE)]
    for flag in sorted(close, key=lambda flag: not FLAGS[flag].keys)[:1]:  # one with a counterpart first
        return f"unknown key; {UNKNOWN}; did you mean {flag}? {say(flag, FLAGS[flag], known)}"
    return f"unknown key; {UNKNOWN}, and its section {first} is {SECTIONS[first]} here"


def _places(targets: Collection[str], known: Collection[str], role: str | None) -> Iterator[str]:
    """The keys that the job has of ``targets``."""
    for target in targets:
        if not target.startswith("ROLE."):
            yield from [key for key in target.split("|") if key in known][:1]
        elif role is not None and target.replace("ROLE", role) in known:
            yield target.replace("ROLE", role)
        else:
            tail = target.removeprefix("ROLE")
            same = [key for key in known if key.count(SEPARATOR) == target.count(SEPARATOR) and key.endswith(tail)]
            yield from [" or ".join(same)] if same else []
