"""Find out which known key each unknown key of a config was meant to be.

Invariants: every unknown key is reported once, flags of OpenRLHF by their whole names; if a key is a misspelling of a missing
key, its value is checked under that key, so that a misspelt section is not reported as missing too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config.keys import entries_of, join, keys_of, roles_of, section_of
from rlhf_ray.config.openrlhf.answers import hint, take_flags
from rlhf_ray.config.reading import SEPARATOR
from rlhf_ray.config.sections.base import Section

CLOSE = 0.6
"""How much of two names must agree for one to be a misspelling of the other, from 0 to 1 (difflib's ratio)."""

LENGTHS = ("steps", "epochs")
"""Keys that say how long a run is; a kind of job has one of them."""

VERY_CLOSE = 0.75
"""The same for a name that is looked for in other sections too, where more names are alike by chance."""


@dataclass
class Settled:
    """The values of a config under keys that exist, and the problems with all other keys."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    """Key as it should be -> key as it was written."""


def settle(job: type[Section], values: Mapping[str, Any]) -> Settled:
    """Sort the unknown keys out of ``values``; what one of them was meant to be takes its place where that is free."""
    own_values, flags = take_flags(values, keys_of(job))
    settled = Settled(problems=flags)
    settled.values = _settle(job, job, own_values, "", settled)
    return settled


def _settle(
    job: type[Section], section: type[Section], values: Mapping[str, Any], at: str, settled: Settled
) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name in section.model_fields}
    for name, value in values.items():
        if name not in section.model_fields:
            settled.problems.append((join(at, name), f"unknown key; {_advice(job, section, name, at)}"))
            is_answered = _flag_hint(job, name, at) or _own_length(job, name, at)
            meant = None if is_answered else _meant_key(section, name)
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


def _meant_key(section: type[Section], name: str) -> str | None:
    """The key of this section that ``name`` is a misspelling of."""
    plain = name.lower().replace("-", "_").strip("_ ")
    if plain in section.model_fields:
        return plain
    longer = [known for known in section.model_fields if known.startswith(plain + "_")]
    if len(longer) == 1:
        return longer[0]
    close = difflib.get_close_matches(plain, section.model_fields, n=3, cutoff=CLOSE)
    return max(close, key=lambda known: sorted(known) == sorted(plain), default=None)  # swapped letters first


def _deeper_keys(name: str, keys: Iterable[str]) -> list[str]:
    """The keys whose last part ``name`` is most probably a misspelling of.

    Whole dotted keys are not compared: what two keys of one section have in common would make any two of them alike.
    """
    last_parts = {key: key.rpartition(SEPARATOR)[2] for key in keys}
    closest = difflib.get_close_matches(name, sorted(set(last_parts.values())), n=1, cutoff=VERY_CLOSE)
    return [key for key, last in last_parts.items() if last in closest]


def _advice(job: type[Section], section: type[Section], name: str, at: str) -> str:
    """What to write in place of an unknown key: OpenRLHF's names first, then misspellings, then the same name elsewhere."""
    keys = keys_of(job)
    if SEPARATOR in name and join(at, name) in keys:
        section_name, _, inner = name.rpartition(SEPARATOR)
        return f"write {inner} inside of the section {join(at, section_name)}, not with dots"
    from_openrlhf = _flag_hint(job, name, at)
    if from_openrlhf:
        return from_openrlhf
    own_length = _own_length(job, name, at)
    if own_length:
        return f"this job is as long as its {own_length} say: did you mean {own_length}?"
    meant = _meant_key(section, name)
    same_name = [key for key in keys if key.rpartition(SEPARATOR)[2] == name]
    inside = [key for key in same_name if key.startswith(at + SEPARATOR)] if at else same_name
    suggestions = [join(at, meant)] if meant is not None else inside or same_name
    suggestions = suggestions or _deeper_keys(name, [key for key in keys if key.startswith(join(at, ""))])
    if suggestions:
        return f"did you mean {' or '.join(suggestions)}?"
    return f"keys here are {', '.join(section.model_fields)}"


def _own_length(job: type[Section], name: str, at: str) -> str:
    """The key that says how long a job is, for one that says it of another; empty for any other key."""
    own = [key for key in LENGTHS if key in job.model_fields]
    return own[0] if own and not at and name in LENGTHS else ""


def _flag_hint(job: type[Section], name: str, at: str) -> str:
    """What is said to an unknown key that is the name of a flag of OpenRLHF; empty for another one."""
    outermost = at.partition(SEPARATOR)[0]
    return hint(name, keys_of(job), role=outermost if outermost in roles_of(job) else None)
