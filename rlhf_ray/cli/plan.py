"""The command ``rlhf-ray plan``: print the batch arithmetic and the placement of a job."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import write_result

EXAMPLES = (
    "plan llama-3-8b-8gpu",
    "plan my-ppo.yaml policy.ranks=8",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "plan",
        help="batch arithmetic and placement, before anything is allocated",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the sizes of the job and what the cluster must hold; returns the exit code."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.planning.arithmetic import batch_table
    from rlhf_ray.planning.capacity import capacity_table, needed

    config = load_config(options.config, options.overrides)
    write_result(f"{batch_table(config)}\n\n{capacity_table(needed(config))}\n")
    return 0
