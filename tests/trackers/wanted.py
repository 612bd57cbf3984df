"""Print what the extras of the trackers ask for, one requirement a word, for ``make trackers``."""

from __future__ import annotations

import tomllib
from pathlib import Path

EXTRAS = ("tensorboard", "wandb", "mlflow", "trackio")


def wanted() -> list[str]:
    """The requirements of all extras."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    return [line.replace(" ", "") for extra in EXTRAS for line in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print(*wanted())
