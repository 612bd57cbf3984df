"""Loads a job from a config file with overrides, checks it, and writes it back as text.

Invariants: everything that is wrong with a config comes at once, in one :class:`ConfigError`: broken YAML, unknown keys,
wrong values, values that contradict each other, files that do not exist on this machine. ``dump_config`` writes every
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
from rlhf_ray.config.sections.data import RowsConfig
from rlhf_ray.config.validation import parse, show
from rlhf_ray.config.writing import write_mapping
from rlhf_ray.errors import ConfigError

AnyJob = TypeVar("AnyJob", bound=Job)

OWN_DATA = "data"
"""The value of ``model.make.tokenizer_from`` that stands for the job's own data."""


def load_config(
    source: str | Path, overrides: Sequence[str] = (), kind: str | None = None, *, files: bool = False
) -> Job:
    """Read the file or recipe ``source``, apply ``overrides`` (``a.b=value``), and check the result.

    ``kind`` is the kind of job that it must be (none: any). With ``files`` the files that it names are checked too, and
    their problems come together with the others. Raises :class:`ConfigError` with every problem.
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
    """The same as :func:`load_config` for a config given as text; messages call it ``source``."""
    document = read_mapping(text)
    if document.problems and not document.values:
        raise ConfigError(document.problems, source)
    apply_overrides(document, overrides)
    job, kind_problems = _kind_of_job(document.values, kind)
    _write_out_own_data(document.values)
    _write_out_algorithm(document.values)
    parsed = parse(job_class(job), {**document.values, "kind": job})
    rules = [*parsed.config.rules(), *(parsed.config.files() if files else ())]
    problems = [*kind_problems, *parsed.problems, *attempt(rules, partial=not parsed.complete)]
    lines = [*document.problems, *(_with_origin(problem, document, parsed.settled.renamed) for problem in problems)]
    if lines:
        raise ConfigError(lines, source)
    return parsed.config


def load_job(job: type[AnyJob], source: str | Path, overrides: Sequence[str] = (), *, files: bool = False) -> AnyJob:
    """The same as :func:`load_config` for a config that must be of the kind of ``job``, such as ``SftConfig``."""
    return cast(AnyJob, load_config(source, overrides, job.kind_name(), files=files))


def take_rows_settings(overrides: Sequence[str]) -> tuple[RowsConfig, list[str]]:
    """The settings among ``overrides`` that say how rows are read (``data.ignore_columns=[label]``), and the others.

    For commands that read rows without a job. Raises :class:`ConfigError` with every problem.
    """
    prefix = f"data{SEPARATOR}"
    own = [text for text in overrides if text.strip().startswith(prefix)]
    document = Document()
    apply_overrides(document, own)
    parsed = parse(RowsConfig, document.values.get("data", {}))
    lines = [*document.problems, *(f"{prefix}{key}: {problem}" for key, problem in parsed.problems)]
    if lines:
        raise ConfigError(lines, "command line")
    return parsed.config, [text for text in overrides if text not in own]


def dump_config(config: Job) -> str:
    """The resolved config as YAML, every default written out."""
    return write_mapping(config.model_dump(mode="json"))


def _kind_of_job(values: Mapping[str, Any], wanted: str | None) -> tuple[str, list[Problem]]:
    """The kind of a config; if ``kind`` is wrong or missing, the likeliest kind and that problem."""
    kinds = ", ".join(KINDS)
    if wanted is not None and wanted not in KINDS:
        raise ConfigError([f"{wanted} is not a kind of job: kinds are {kinds}"], "train")
    kind = values.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        wrong = f"{kind}, but {wanted} was asked for: run this config as {kind}, or name one of kind {wanted}"
        return kind, [] if wanted in (None, kind) else [("kind", wrong)]
    close = difflib.get_close_matches(str(kind), KINDS, n=1)
    likely = wanted or (close[0] if close else _most_alike(values))
    if kind is None:
        return likely, [("kind", f"missing: it must be one of {kinds}; this looks like {likely}")]
    return likely, [("kind", f"{show(kind)} is not one of {kinds}; did you mean {likely}?")]


def _most_alike(values: Mapping[str, Any]) -> str:
    """The kind of job that has the most of the sections that are written."""
    sections = {kind: job.model_fields.keys() for kind, job in job_classes().items()}
    return max(sections, key=lambda kind: len(values.keys() & sections[kind]))


def _write_out_own_data(values: Mapping[str, Any]) -> None:
    """Replace ``tokenizer_from: data`` by the path that it stands for, so that the resolved config says it."""
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


def _write_out_algorithm(values: dict[str, Any]) -> None:
    """Add the keys that the name of an algorithm chooses, so that problems are reported about the values that would run."""
    algorithm = values.get("algorithm")
    if isinstance(algorithm, dict):
        values["algorithm"] = with_preset(algorithm)


def _with_origin(problem: Problem, document: Document, renamed: Mapping[str, str]) -> str:
    """A problem as one line of text, with the line of the file where its key stands."""
    key, text = problem
    parts = key.split(SEPARATOR)
    prefixes = [SEPARATOR.join(parts[: depth + 1]) for depth in range(len(parts))]
    written = [renamed.get(prefix, prefix).rpartition(SEPARATOR)[2] for prefix in prefixes]
    origin = document.origin(SEPARATOR.join(written))
    return f"{key}: {text}{f' ({origin})' if origin else ''}"
