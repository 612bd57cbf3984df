"""From a file and overrides to a checked job, and back to text.

Always true: what is wrong with a config comes at once, in one :class:`ConfigError`: what is no YAML, what is no setting
or no value, what contradicts another value, what does not exist on this machine. ``dump_config`` writes every
default out, and loading what it wrote gives an equal job.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.jobs.registry import KINDS, job_class, job_classes
from rlhf_ray.config.overrides import apply_overrides
from rlhf_ray.config.problems import Problem, attempt
from rlhf_ray.config.reading import SEPARATOR, Document, read_mapping
from rlhf_ray.config.recipes import find
from rlhf_ray.config.sections.algorithm import with_preset
from rlhf_ray.config.validation import parse, show
from rlhf_ray.config.writing import write_mapping
from rlhf_ray.errors import ConfigError

AnyJob = TypeVar("AnyJob", bound=Job)

OWN_DATA = "data"
"""What ``model.make.tokenizer_from`` says to mean the job's own data."""


def load_config(
    source: str | Path, overrides: Sequence[str] = (), kind: str | None = None, *, files: bool = False
) -> Job:
    """Read the file or recipe ``source``, apply ``overrides`` (``a.b=value``), and check what it says.

    ``kind`` is the kind of job that is asked for (none: any). With ``files`` what it names on this machine is checked
    too, and its problems come together with the others.
    """
    path = find(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read: {error}"], str(source)) from error
    return parse_config(text, overrides, kind, source=str(source), files=files)


def parse_config(
    text: str, overrides: Sequence[str] = (), kind: str | None = None, *, source: str = "config", files: bool = False
) -> Job:
    """The same for a config that is at hand as text."""
    document = read_mapping(text)
    if document.problems and not document.values:
        raise ConfigError(document.problems, source)
    apply_overrides(document, overrides)
    job, kind_problems = _job(document.values, kind)
    _name_own_data(document.values)
    _name_parts(document.values)
    parsed = parse(job_class(job), {**document.values, "kind": job})
    rules = [*parsed.config.rules(), *(parsed.config.files() if files else ())]
    problems = [*kind_problems, *parsed.problems, *attempt(rules, partial=not parsed.complete)]
    lines = [*document.problems, *(_located(problem, document, parsed.settled.renamed) for problem in problems)]
    if lines:
        raise ConfigError(lines, source)
    return parsed.config


def load_job(job: type[AnyJob], source: str | Path, overrides: Sequence[str] = (), *, files: bool = False) -> AnyJob:
    """The same as :func:`load_config` for a config that must be of the kind of ``job``, such as ``SftConfig``."""
    return cast(AnyJob, load_config(source, overrides, job.kind_name(), files=files))


def dump_config(config: Job) -> str:
    """The resolved config as YAML, every default written out."""
    return write_mapping(config.model_dump(mode="json"))


def _job(values: Mapping[str, Any], asked: str | None) -> tuple[str, list[Problem]]:
    """Which job this is, and what is wrong with saying so; the rest is then checked as the job that is most likely."""
    kinds = ", ".join(KINDS)
    if asked is not None and asked not in KINDS:
        raise ConfigError([f"{asked} is not a kind of job: kinds are {kinds}"], "train")
    kind = values.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        wrong = f"{kind}, but {asked} was asked for: run this config as {kind}, or name one of kind {asked}"
        return kind, [] if asked in (None, kind) else [("kind", wrong)]
    close = difflib.get_close_matches(str(kind), KINDS, n=1)
    likely = asked or (close[0] if close else _most_alike(values))
    if kind is None:
        return likely, [("kind", f"missing: it must be one of {kinds}; this looks like {likely}")]
    return likely, [("kind", f"{show(kind)} is not one of {kinds}; did you mean {likely}?")]


def _most_alike(values: Mapping[str, Any]) -> str:
    """The kind of job that has the most of the sections that are written."""
    sections = {kind: job.model_fields.keys() for kind, job in job_classes().items()}
    return max(sections, key=lambda kind: len(values.keys() & sections[kind]))


def _name_own_data(values: Mapping[str, Any]) -> None:
    """Write out what ``tokenizer_from: data`` means, so that the resolved config says it."""
    own = values.get("data")
    if not isinstance(own, dict):
        return
    origin = "world" if own.get("world") is not None else own.get("path") or _first_path(own.get("sources"))
    for role in values.values():
        model = role.get("model") if isinstance(role, dict) else None
        make = model.get("make") if isinstance(model, dict) else None
        if isinstance(make, dict) and make.get("tokenizer_from") == OWN_DATA and isinstance(origin, str):
            make["tokenizer_from"] = origin


def _first_path(sources: Any) -> Any:
    first = next(iter(sources.values()), None) if isinstance(sources, dict) else None
    return first.get("path") if isinstance(first, dict) else None


def _name_parts(values: dict[str, Any]) -> None:
    """Write out the parts that an algorithm's name chooses, so that every problem is told about the parts that would run."""
    algorithm = values.get("algorithm")
    if isinstance(algorithm, dict):
        values["algorithm"] = with_preset(algorithm)


def _located(problem: Problem, document: Document, renamed: Mapping[str, str]) -> str:
    """A problem as one line, with the place in the file where its key stands."""
    key, text = problem
    parts = key.split(SEPARATOR)
    prefixes = [SEPARATOR.join(parts[: depth + 1]) for depth in range(len(parts))]
    written = [renamed.get(prefix, prefix).rpartition(SEPARATOR)[2] for prefix in prefixes]
    origin = document.origin(SEPARATOR.join(written))
    return f"{key}: {text}{f' ({origin})' if origin else ''}"
