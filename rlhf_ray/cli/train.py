"""``rlhf-ray train KIND CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.config.jobs.registry import trained_kinds


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    kinds = trained_kinds()
    command = commands.add_parser("train", help=f"train a model: {', '.join(kinds[:-1])} or {kinds[-1]}")
    command.add_argument("kind", choices=kinds)
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Check everything that can be checked without a cluster, then hand over to a driver."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.launch.parent import start_run

    config = load_config(given.config, given.overrides, kind=given.kind, files=True)
    return start_run(config)
