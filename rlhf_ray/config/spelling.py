"""The keys a job has, what each of them wants, and which of them somebody meant.

Always true: everything here is read off the schema; no key is named a second time.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from rlhf_ray.config.openrlhf import hint
from rlhf_ray.config.reading import SEPARATOR
from rlhf_ray.config.sections.base import Section

CLOSE = 0.6
WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def join(section: str, name: str) -> str:
    """The dotted key of ``name`` in ``section``."""
    return f"{section}{SEPARATOR}{name}" if section else name


def section_of(annotation: Any) -> type[Section] | None:
    """The section that ``annotation`` is, or that it may be beside null."""
    for choice in _choices(annotation):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def entries_of(annotation: Any) -> type[Section] | None:
    """The section that every entry of a mapping by names is; none where ``annotation`` is no such mapping."""
    for choice in _choices(annotation):
        if get_origin(choice) is dict:
            return section_of(get_args(choice)[1])
    return None


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


@cache
def keys_of(job: type[Section]) -> tuple[str, ...]:
    """Every key of a job, sections included, dotted."""
    return tuple(_walk(job, ""))


def _walk(section: type[Section], at: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield join(at, name)
        inner = section_of(info.annotation)
        if inner is not None:
            yield from _walk(inner, join(at, name))


def roles_of(job: type[Section]) -> tuple[str, ...]:
    """The sections of a job that hold a model."""
    return tuple(name for name in job.model_fields if f"{name}.model" in keys_of(job))


# ------------------------------------------------------------------------------------------------- what a key wants


def wanted(info: FieldInfo) -> str:
    """What may stand at a key, in words."""
    if info.description is not None:
        return info.description
    return _wanted(info.annotation, info.metadata)


def _wanted(annotation: Any, bounds: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return _wanted(inner, [bound for part in metadata for bound in _bounds(part)])
    if get_origin(annotation) is Literal:
        *first, last = map(str, get_args(annotation))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(annotation) is tuple:
        inner_words = _wanted(get_args(annotation)[0], [])
        return f"a list of {len(get_args(annotation))}, each {inner_words}"
    if get_origin(annotation) is list:
        return f"a list, each {_wanted(get_args(annotation)[0], [])}"
    entry = entries_of(annotation)
    if entry is not None:
        return f"a mapping of names to sections, each with keys {', '.join(entry.model_fields)}"
    choices = _choices(annotation)
    if len(choices) > 1:
        return " or ".join("null" if choice is type(None) else _wanted(choice, bounds) for choice in choices)
    section = section_of(annotation)
    if section is not None:
        return f"a section with keys {', '.join(section.model_fields)}"
    return WORDS[annotation] + _range(bounds)


def _bounds(part: Any) -> list[Any]:
    return part.metadata if isinstance(part, FieldInfo) else [part]


def _range(bounds: list[Any]) -> str:
    least = [bound.ge for bound in bounds if isinstance(bound, Ge)]
    if least and len(bounds) == 1:
        return f" of {least[0]:g} or more"
    words = []
    for bound in bounds:
        if isinstance(bound, Ge):
            words.append(f" from {bound.ge:g}")
        elif isinstance(bound, Gt):
            words.append(f" above {bound.gt:g}")
        elif isinstance(bound, Le):
            words.append(f" to {bound.le:g}")
        elif isinstance(bound, Lt):
            words.append(f" to below {bound.lt:g}")
    return "".join(words)


# ------------------------------------------------------------------------------------------------- what somebody meant


@dataclass
class Settled:
    """The values of a config under keys that exist, and what had to be said about the others."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    """Key as it should be -> key as it was written."""


def settle(job: type[Section], values: Mapping[str, Any]) -> Settled:
    """Take unknown keys out of ``values``; one that is a slip for a key that is missing stands in for it.

    So a misspelt section is checked inside like any other, and is not reported as missing too.
    """
    settled = Settled()
    settled.values = _settle(job, job, values, "", settled)
    return settled


def _settle(
    job: type[Section], section: type[Section], values: Mapping[str, Any], at: str, settled: Settled
) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name in section.model_fields}
    for name, value in values.items():
        if name not in section.model_fields:
            settled.problems.append((join(at, name), f"unknown key; {_advice(job, section, name, at)}"))
            meant = _slip(section, name)
            if meant is not None and meant not in kept:
                kept[meant] = value
                settled.renamed[join(at, meant)] = join(at, name)
    for name, value in kept.items():
        annotation, here = section.model_fields[name].annotation, join(at, name)
        inner, entry = section_of(annotation), entries_of(annotation)
        if inner is not None and isinstance(value, dict):
            kept[name] = _settle(job, inner, value, here, settled)
        elif entry is not None and isinstance(value, dict):
            kept[name] = {
                key: _settle(job, entry, one, join(here, key), settled) if isinstance(one, dict) else one
                for key, one in value.items()
            }
    return kept


def _slip(section: type[Section], name: str) -> str | None:
    """The key of this section that ``name`` is a slip for."""
    plain = name.lower().replace("-", "_").strip("_ ")
    if plain in section.model_fields:
        return plain
    longer = [known for known in section.model_fields if known.startswith(plain + "_")]
    if len(longer) == 1:
        return longer[0]
    close = difflib.get_close_matches(plain, section.model_fields, n=3, cutoff=CLOSE)
    return max(close, key=lambda known: sorted(known) == sorted(plain), default=None)  # swapped letters first


def _advice(job: type[Section], section: type[Section], name: str, at: str) -> str:
    keys = keys_of(job)
    outermost = at.partition(SEPARATOR)[0]
    from_openrlhf = hint(name, known=keys, role=outermost if outermost in roles_of(job) else None)
    if from_openrlhf:
        return from_openrlhf
    slip = _slip(section, name)
    candidates = [key for key in keys if key.rpartition(SEPARATOR)[2] == name]
    inside = [key for key in candidates if key.startswith(at + SEPARATOR)] if at else candidates
    meant = [join(at, slip)] if slip is not None else inside or candidates
    meant = meant or difflib.get_close_matches(join(at, name), keys, n=1, cutoff=CLOSE)
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    return f"keys here are {', '.join(section.model_fields)}"
