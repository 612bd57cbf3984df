"""``rlhf-ray plan CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("plan", help="batch arithmetic and placement, before anything is allocated")
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print what the sizes come to and what the cluster must hold."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.planning.arithmetic import batch_table
    from rlhf_ray.planning.capacity import capacity_table, needed

    config = load_config(given.config, given.overrides)
    sys.stdout.write(f"{batch_table(config)}\n\n{capacity_table(needed(config))}\n")
    return 0
