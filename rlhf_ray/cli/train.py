"""``rlhf-ray train KIND CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("train", help="train a model: sft, rm or ppo")
    command.add_argument("kind", choices=("sft", "rm", "ppo"))
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Check everything that can be checked without a cluster, then hand over to a driver."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.launch.parent import start_run

    config = load_config(given.config, given.overrides, kind=given.kind, files=True)
    return start_run(config)
