"""Makes the paths in a config absolute, so that it means the same wherever a process runs.

Invariant: hub ids, names such as ``world``, and paths that are absolute already stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray import environment
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.trackers import target

AnyJob = TypeVar("AnyJob", bound=Job)

NAMED_KEYS = {"path", "evaluation_path", "tokenizer_from"}
"""Keys whose value may also be a name: a hub id, or a name that this project gives."""
PATH_KEYS = {"root", "cache", "token_file", "demonstrations_path"} | NAMED_KEYS
PYTHON_OBJECT = re.compile(r".+\.py:\w+")
"""``path.py:name``, under whichever key."""


def run_directory(config: Job) -> Path:
    """The run directory of ``config``."""
    return Path(config.run.root) / config.run.name


def with_absolute_paths(config: AnyJob, directory: Path) -> AnyJob:
    """``config`` with every relative path taken from ``directory``."""
    return type(config).model_validate(_absolute(config.model_dump(), directory))


def _absolute(value: Any, directory: Path, key: str = "") -> Any:
    if key == "parameters":  # free values, which only the part that takes them understands
        return value
    if isinstance(value, dict):
        return {name: _absolute(item, directory, name) for name, item in value.items()}
    if key == "trackers":
        return [str(target(text).with_absolute_place(directory)) for text in value]
    if isinstance(value, str) and PYTHON_OBJECT.fullmatch(value):
        return str(directory / environment.expand_home(value))
    if key == "ensemble":
        return [_absolute(path, directory, "path") for path in value]
    if key in PATH_KEYS and isinstance(value, str) and not (key in NAMED_KEYS and _is_name(value, directory)):
        return str(directory / environment.expand_home(value))
    return value


def _is_name(value: str, directory: Path) -> bool:
    """Whether ``value`` is a name; ``folder/name`` is a path, not a hub id, where ``folder`` is in ``directory``."""
    return environment.is_hub_id(value, directory) or value in ("world", "data")
