"""The dotted keys of a job, read from the classes of its sections.

Invariant: no key is written down a second time here; whatever a section declares is a key.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from typing import Any, Union, get_args, get_origin

from rlhf_ray.config.reading import SEPARATOR
from rlhf_ray.config.sections.base import Section


def join(section: str, name: str) -> str:
    """The dotted key of ``name`` in ``section``."""
    return f"{section}{SEPARATOR}{name}" if section else name


@cache
def keys_of(job: type[Section]) -> tuple[str, ...]:
    """Every key of a job, sections included, dotted."""
    return tuple(_walk(job, ""))


def roles_of(job: type[Section]) -> tuple[str, ...]:
    """The sections of a job that hold a model."""
    return tuple(name for name in job.model_fields if f"{name}.model" in keys_of(job))


def section_of(annotation: Any) -> type[Section] | None:
    """The section class in ``annotation``, alone or beside null."""
    for choice in choices_of(annotation):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def entries_of(annotation: Any) -> type[Section] | None:
    """The section class of the entries of a mapping by names; none if ``annotation`` is not such a mapping."""
    for choice in choices_of(annotation):
        if get_origin(choice) is dict:
            return section_of(get_args(choice)[1])
    return None


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a union allows; any other annotation is its own only choice."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _walk(section: type[Section], at: str) -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield join(at, name)
        inner = section_of(info.annotation)
        if inner is not None:
            yield from _walk(inner, join(at, name))
