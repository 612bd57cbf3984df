"""Checks plain values against the sections of a job, and reports every wrong value at once.

Invariants: a config without problems is a fully validated job. A config with problems is built too, as far as its values
go: a value that is wrong or missing is absent from it and never replaced by its default, so that whatever needs that value
is left unchecked and everything else is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf_ray.config.expectations import expected_value
from rlhf_ray.config.keys import entries_of, join, section_of
from rlhf_ray.config.problems import Problem, attempt
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.spelling import Settled, settle
from rlhf_ray.config.writing import write_value

Kind = TypeVar("Kind", bound=Section)


@dataclass(frozen=True)
class Parsed(Generic[Kind]):
    """A job as far as its values go."""

    config: Kind
    problems: tuple[Problem, ...]
    settled: Settled

    @property
    def complete(self) -> bool:
        """Whether nothing was wrong, so that ``config`` is a valid job."""
        return not self.problems


def parse(job: type[Kind], values: Mapping[str, Any]) -> Parsed[Kind]:
    """Read ``values`` as a ``job``: unknown keys, missing keys, wrong values, values that exclude each other."""
    settled = settle(job, values)
    try:
        return Parsed(job.model_validate(settled.values), tuple(settled.problems), settled)
    except ValidationError as error:
        # conflicts between values are found again below, where each gets its own key
        locations = [tuple(map(str, entry["loc"])) for entry in error.errors() if entry["type"] != "value_error"]
    builder = _Builder(locations)
    config = builder.build(job, settled.values)
    conflicts = attempt([lambda: _conflicts(config, "")], partial=True)
    return Parsed(config, (*settled.problems, *builder.problems, *conflicts), settled)


class _Builder:
    """Builds a job around the locations where validation failed."""

    def __init__(self, locations: Iterable[tuple[str, ...]]) -> None:
        self.locations = tuple(locations)
        self.problems: list[Problem] = []

    def build(self, section: type[Kind], values: Mapping[str, Any], at: tuple[str, ...] = ()) -> Kind:
        """The section at ``at`` with the values that are right, the others absent and reported."""
        right: dict[str, Any] = {}
        absent = []
        for name, info in section.model_fields.items():
            here = (*at, name)
            inner, entry = section_of(info.annotation), entries_of(info.annotation)
            if name not in values:
                if info.is_required():
                    self._report(here, f"missing: it must be {expected_value(info)}")
                    absent.append(name)
            elif inner is not None and isinstance(values[name], dict):
                right[name] = self.build(inner, values[name], here)
            elif entry is not None and isinstance(values[name], dict):
                right[name] = self._entries(entry, values[name], here)
                if values[name] and not right[name]:  # what is left of it can still be checked
                    absent.append(name)
            elif any(location[: len(here)] == here for location in self.locations):
                self._report(here, _explain(values[name], info))
                absent.append(name)
            else:
                right[name] = values[name]
        return section.with_gaps(right, absent)

    def _entries(self, entry: type[Section], values: Mapping[str, Any], at: tuple[str, ...]) -> dict[str, Section]:
        """A mapping by names, without the entries that cannot be sections."""
        sections: dict[str, Section] = {}
        for name, value in values.items():
            here = (*at, name)
            if (*here, "[key]") in self.locations:
                self._report(
                    at, f"{show(name)} is not a valid name: use letters, digits and '_', beginning with a letter"
                )
            elif isinstance(value, dict):
                sections[name] = self.build(entry, value, here)
            else:
                self._report(here, f"{show(value)} is not a section with keys {', '.join(entry.model_fields)}")
        return sections

    def _report(self, here: tuple[str, ...], text: str) -> None:
        self.problems.append((".".join(here), text))


def show(value: Any) -> str:
    """A value as YAML writes it, on one line; texts in quotes."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, dict):
        return f"a section ({', '.join(map(str, value))})" if value else "an empty section"
    return write_value(value)


def _conflicts(section: Section, at: str) -> Iterator[Problem]:
    """The conflicts inside ``section`` and inside every section in it, each with its full key."""
    problems = attempt([section.conflicts], partial=True)
    yield from ((join(at, key) if key else at, text) for key, text in problems)
    for name in type(section).model_fields:
        value = section.__dict__.get(name)
        inner = value if isinstance(value, dict) else {"": value}
        for key, entry in inner.items():
            if isinstance(entry, Section):
                yield from _conflicts(entry, join(join(at, name), key) if key else join(at, name))


def _explain(value: Any, info: FieldInfo) -> str:
    expected = expected_value(info)
    return f"{show(value)} is not {expected}{_way_out(value, expected)}"


def _way_out(value: Any, expected: str) -> str:
    if isinstance(value, str) and "number" in expected and _is_number(value):
        return "; remove the quotes"
    if "a text" in expected and isinstance(value, bool | int | float):
        return f"; write it in quotes: '{show(value)}'"
    if isinstance(value, float) and "whole number" in expected and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
