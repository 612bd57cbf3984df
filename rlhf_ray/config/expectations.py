"""Describe in words what values a key accepts: the part of an error message after "is not".

Invariant: the words follow from the type and the bounds that a section declares.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from rlhf_ray.config.keys import choices_of, entries_of, section_of

WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def expected_value(info: FieldInfo) -> str:
    """What values a key accepts, in words."""
    if info.description is not None:
        return info.description
    return _describe(info.annotation, info.metadata)


def _describe(annotation: Any, bounds: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *metadata = arguments
        return _describe(inner, [bound for part in metadata for bound in _bounds(part)])
    if origin is Literal:
        *first, last = map(str, arguments)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0], [])}"
    if origin is list:
        return f"a list, each {_describe(arguments[0], [])}"
    if origin is dict:
        return _describe_mapping(annotation)
    choices = choices_of(annotation)
    if len(choices) > 1:
        return " or ".join("null" if choice is type(None) else _describe(choice, bounds) for choice in choices)
    section = section_of(annotation)
    if section is not None:
        return f"a section with keys {', '.join(section.model_fields)}"
    return WORDS[annotation] + _range(bounds)


def _describe_mapping(annotation: Any) -> str:
    entry = entries_of(annotation)
    if entry is None:
        return "a mapping of names to values"
    return f"a mapping of names to sections, each with keys {', '.join(entry.model_fields)}"


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
