"""``rlhf-ray check CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("check", help="validate a config and print it resolved; all errors at once")
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the resolved config on standard output."""
    from rlhf_ray.config.loading import dump_config, load_config

    config = load_config(given.config, given.overrides, files=True)
    sys.stdout.write(dump_config(config))
    return 0
