"""The command ``rlhf-ray submit``: run a job on a Ray cluster through its job server."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "submit demo-ppo --address http://127.0.0.1:8265",
    "submit my-ppo.yaml run.root=/shared/runs --no-wait",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "submit",
        help="run a job on a Ray cluster through ray job submit",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.add_argument("--address", default=None, help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or "
                         "http://127.0.0.1:8265)")  # fmt: skip
    command.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the config here, submit it, stream its log, end with the driver's exit code."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.launch.submit import submit

    config = load_config(options.config, options.overrides)
    return submit(config, address=options.address, wait=not options.no_wait)
