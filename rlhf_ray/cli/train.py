"""The command ``rlhf-ray train``: check a config and train its job in a driver process."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.config.jobs.registry import trained_kinds

EXAMPLES = (
    "train sft demo-sft",
    "train rm hh-rm data.path=pairs.jsonl epochs=2",
    "train ppo my-ppo.yaml steps=100 policy.ranks=4",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    kinds = trained_kinds()
    command = commands.add_parser(
        "train",
        help=f"train a model: {', '.join(kinds[:-1])} or {kinds[-1]}",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("kind", choices=kinds)
    command.add_argument("config", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.add_argument(
        "--in-process",
        action="store_true",
        help="run the driver and one rank of every role in this process, without Ray, to debug them",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check everything that can be checked without a cluster, then run a driver; returns its exit code."""
    from rlhf_ray.config.loading import load_config

    config = load_config(options.config, options.overrides, kind=options.kind, files=True)
    if options.in_process:
        from rlhf_ray.launch.driver import exit_code
        from rlhf_ray.launch.in_process import train_in_process

        return exit_code(lambda: train_in_process(config.to_train()))
    from rlhf_ray.launch.parent import start_run

    return start_run(config)
