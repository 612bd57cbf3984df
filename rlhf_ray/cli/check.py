"""The command ``rlhf-ray check``: validate a config and print it resolved."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "check demo-sft",
    "check my-ppo.yaml data.path=prompts.jsonl > resolved.yaml",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "check",
        help="validate a config and print it resolved; all errors at once",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the resolved config on standard output; returns the exit code."""
    from rlhf_ray.config.loading import dump_config, load_config
    from rlhf_ray.config.preflight import hub_names

    config = load_config(options.config, options.overrides, files=True)
    sys.stdout.write(dump_config(config))
    unseen = [f"{key} {name}" for key, name in hub_names(config)]
    if unseen:
        sys.stderr.write(f"rlhf-ray: not looked at, since only a hub has it: {', '.join(unseen)}\n")
    return 0
