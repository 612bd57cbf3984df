"""Overrides from the command line: ``a.b.c=value``, with values as YAML writes them.

Invariants: a later override wins; an override changes exactly the key that it names; ``key=`` and ``key=null`` clear a
key; an override in the wrong form is reported, never ignored; a flag of OpenRLHF is taken in every form that OpenRLHF takes,
and reported by what checks the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.config.jobs.registry import job_classes
from rlhf_ray.config.keys import keys_of
from rlhf_ray.config.openrlhf.answers import is_flag, plain_name
from rlhf_ray.config.reading import SEPARATOR, Document, read_value

ORIGIN = "command line"


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set every override in ``document``; one that cannot be set is added to the problems of the document."""
    for text in overrides:
        problem = _apply(document, text)
        if problem is not None:
            document.problems.append(problem)


def _apply(document: Document, text: str) -> str | None:
    key, equals, written = text.partition("=")
    key = key.strip()
    if is_flag(key) and not _is_key(plain_name(key)):
        return _set(document, plain_name(key), written)  # it is answered beside the flags of the file
    if key.startswith("-"):
        own = plain_name(key)
        example = f"{own}={written or 'value'}" if _is_key(own) else "run.seed=1"
        return f"{key}: settings are written key=value, without dashes, such as {example}"
    if not equals:
        return f"{text}: not an override: write key=value, such as run.seed=1"
    if not all(key.split(SEPARATOR)):
        return f"{text}: not an override: the key {key!r} has an empty part; write section.key=value"
    try:
        value = read_value(written)
    except ValueError as error:
        return f"{key}: {written[:80]!r} is {str(error).rpartition(': not YAML: ')[2]}; quote it if it is a text"
    return _set(document, key, value)


def _is_key(key: str) -> bool:
    """Whether some kind of job has this key."""
    return any(key in keys_of(job) for job in job_classes().values())


def _set(document: Document, key: str, value: Any) -> str | None:
    section = document.values
    *parents, name = key.split(SEPARATOR)
    for depth, parent in enumerate(parents, 1):
        inner, here = section.get(parent), SEPARATOR.join(parents[:depth])
        if inner is None:
            inner = section[parent] = {}
            document.origins[here] = ORIGIN
        if not isinstance(inner, dict):
            return f"{key}: {here} is the value {inner!r}, which has no keys of its own"
        section = inner
    section[name] = value
    for known in [known for known in document.origins if known == key or known.startswith(key + SEPARATOR)]:
        del document.origins[known]
    document.origins[key] = ORIGIN
    return None
