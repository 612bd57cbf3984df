"""Finds config files: shipped recipes by name, and others by path.

Invariant: a recipe is the same file in a source tree (``configs/``) and in a wheel (``rlhf_ray/configs/``).
"""

from __future__ import annotations

import difflib
from pathlib import Path

from rlhf_ray.errors import ConfigError

CONFIG_NAME = "config.yaml"
"""The resolved config in a run directory."""
SUFFIXES = (".yaml", ".yml")
PACKAGE = Path(__file__).parent.parent
# In a wheel the first one exists, and the second would belong to whatever else is installed beside the package.
DIRECTORIES = (PACKAGE / "configs", PACKAGE.parent / "configs")


def recipes() -> dict[str, Path]:
    """Every shipped recipe by its name."""
    directory = next((directory for directory in DIRECTORIES if directory.is_dir()), PACKAGE)
    return {file.stem: file for file in sorted(directory.glob("*.yaml"))}


def find(source: str | Path) -> Path:
    """The file that ``source`` means: a path, or the name of a shipped recipe."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = recipes()
    if str(source) in shipped:
        return shipped[str(source)]
    if path.is_dir():
        raise ConfigError([f"is a directory: name a file in it{_run_config(path)}"], str(source))
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise ConfigError(["no such file"], str(source))
    close = difflib.get_close_matches(str(source), shipped, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise ConfigError([f"neither a file nor a recipe; {meant}recipes are {', '.join(sorted(shipped))}"], str(source))


def _run_config(directory: Path) -> str:
    config = directory / CONFIG_NAME
    return f", such as {config}" if config.is_file() else ""
