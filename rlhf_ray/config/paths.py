"""Paths in a config, made independent of where a process stands.

Always true: hub ids, named functions and paths that are absolute already stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray import environment
from rlhf_ray.config.jobs.base import Job

AnyJob = TypeVar("AnyJob", bound=Job)

NAMED_KEYS = {"path", "evaluation_path", "tokenizer_from"}
"""Keys of what may also have a name: on a hub, or in this project."""
CODE_KEYS = {"function", "gold", "source", "advantages", "objective", "collector"}
"""Keys of what may be ``path.py:name``."""
PATH_KEYS = {"root", "cache", "token_file", "demonstrations_path"} | NAMED_KEYS


def run_directory(config: Job) -> Path:
    """Where the run of ``config`` lies."""
    return Path(config.run.root) / config.run.name


def with_absolute_paths(config: AnyJob, directory: Path) -> AnyJob:
    """``config`` with every relative path read from ``directory``."""
    return type(config).model_validate(_absolute(config.model_dump(), directory))


def _absolute(value: Any, directory: Path, key: str = "") -> Any:
    if key == "parameters":  # free values, which only the part that takes them understands
        return value
    if isinstance(value, dict):
        return {name: _absolute(item, directory, name) for name, item in value.items()}
    if key in CODE_KEYS and isinstance(value, str) and ".py:" in value:
        return str(directory / Path(value).expanduser())
    if key in PATH_KEYS and isinstance(value, str) and not (key in NAMED_KEYS and _is_name(value, directory)):
        return str(directory / Path(value).expanduser())
    return value


def _is_name(value: str, directory: Path) -> bool:
    """A hub id; ``folder/name`` is a path where ``folder`` stands in ``directory``."""
    on_hub = environment.is_hub_id(value) and not (directory / value).parent.is_dir()
    return on_hub or value in ("world", "data")
