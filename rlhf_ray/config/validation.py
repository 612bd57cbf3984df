"""From plain values to a job, with every value that is wrong at once.

Always true: a config without problems is a fully validated job; one with problems is built all the same, as far as its
values go, and a value that is wrong or missing is absent from it, never replaced by its default: what needs that value
cannot be checked yet, and everything else is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlhf_ray.config.problems import Problem, attempt
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.spelling import Settled, entries_of, join, section_of, settle, wanted
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
        locations = [tuple(map(str, found["loc"])) for found in error.errors() if found["type"] != "value_error"]
    builder = _Builder(locations)
    config = builder.build(job, settled.values)
    conflicts = attempt([lambda: _conflicts(config, "")], partial=True)
    return Parsed(config, (*settled.problems, *builder.problems, *conflicts), settled)


class _Builder:
    """Builds a job around the locations where validation found something wrong."""

    def __init__(self, locations: Iterable[tuple[str, ...]]) -> None:
        self.locations = tuple(locations)
        self.problems: list[Problem] = []

    def build(self, section: type[Kind], values: Mapping[str, Any], at: tuple[str, ...] = ()) -> Kind:
        made: dict[str, Any] = {}
        absent = []
        for name, info in section.model_fields.items():
            here = (*at, name)
            inner, entry = section_of(info.annotation), entries_of(info.annotation)
            if name not in values:
                if info.is_required():
                    self._report(here, f"missing: it must be {wanted(info)}")
                    absent.append(name)
            elif inner is not None and isinstance(values[name], dict):
                made[name] = self.build(inner, values[name], here)
            elif entry is not None and isinstance(values[name], dict):
                made[name] = self._entries(entry, values[name], here)
                if len(made[name]) < len(values[name]):
                    absent.append(name)
            elif any(location[: len(here)] == here for location in self.locations):
                self._report(here, _explain(values[name], info))
                absent.append(name)
            else:
                made[name] = values[name]
        return section.partial(made, absent)

    def _entries(self, entry: type[Section], values: Mapping[str, Any], at: tuple[str, ...]) -> dict[str, Section]:
        """A mapping by names, without the entries that cannot be sections."""
        made: dict[str, Section] = {}
        for name, value in values.items():
            here = (*at, name)
            if (*here, "[key]") in self.locations:
                self._report(at, f"{show(name)} is no name: use letters, digits and '_', a letter first")
            elif isinstance(value, dict):
                made[name] = self.build(entry, value, here)
            else:
                self._report(here, f"{show(value)} is not a section with keys {', '.join(entry.model_fields)}")
        return made

    def _report(self, here: tuple[str, ...], text: str) -> None:
        self.problems.append((".".join(here), text))


def _conflicts(section: Section, at: str) -> Iterator[Problem]:
    found = attempt([section.conflicts], partial=True)
    yield from ((join(at, key) if key else at, text) for key, text in found)
    for name in type(section).model_fields:
        value = section.__dict__.get(name)
        if isinstance(value, Section):
            yield from _conflicts(value, join(at, name))
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield from _conflicts(entry, join(join(at, name), key))


def _explain(value: Any, info: FieldInfo) -> str:
    want = wanted(info)
    return f"{show(value)} is not {want}{_way_out(value, want)}"


def _way_out(value: Any, want: str) -> str:
    numeric = "number" in want
    if isinstance(value, str) and numeric and _is_number(value):
        return "; remove the quotes"
    if "a text" in want and isinstance(value, bool | int | float):
        return f"; write it in quotes: '{show(value)}'"
    if isinstance(value, float) and "whole number" in want and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show(value: Any) -> str:
    """A value as YAML writes it, on one line; texts in quotes."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, dict):
        return f"a section ({', '.join(map(str, value))})" if value else "an empty section"
    return write_value(value)
